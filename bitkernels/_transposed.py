"""Transposed convolutions as ordinary ones: checks, shape arithmetic and the phases of the output.

Along one axis, output y of a transposed convolution with stride s, padding p and dilation d is the
sum of x[i] w[k] over all taps k and inputs i with i s - p + k d = y. Outputs y = s m + r of one
phase r in [0, s) see the taps with k d = r + p (mod s). With g = gcd(s, d) there are none unless g
divides r + p; then they are k0, k0 + s / g, k0 + 2 s / g, ..., T of them below the kernel's size,
with k0 the least solution (`phases` goes through k0). Tap k0 + t s / g reads the input at

    i = (s m + r + p - (k0 + t s / g) d) / s = m + o - t d / g,    o = (r + p - k0 d) / s,

an integer. So the phase is an ordinary convolution of stride 1 and dilation d / g with every
(s / g)-th tap in reverse order, whose window for m = 0 begins at input o - (T - 1) d / g. Where
that is negative the input is padded; where it is positive its first rows are not read. The same
holds at the other end. Zero padding contributes exactly 0, so the phases put together are exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from bitkernels._checks import (
    check_channel_vector,
    check_epilogue,
    check_groups,
    check_same_device,
    check_train,
    check_words,
    describe,
    fail,
    pair,
)


class Phase(NamedTuple):
    """Outputs first, first + stride, ... along one axis, for inputs of every size."""

    first: int
    taps: slice  # of the filter, to be reversed
    dilation: int  # between taps, in the input
    start: int  # the input under the first tap for the first output, may be negative
    end: int  # past the input under the last tap for the last output, counted from the input's end


def phases(kernel: int, stride: int, padding: int, output_padding: int,
           dilation: int) -> list[Phase]:
    """The phases along one axis that have taps: at most one for each tap."""
    beyond = _beyond(kernel, stride, padding, output_padding, dilation)
    g = math.gcd(stride, dilation)
    step, spacing = stride // g, dilation // g
    found = []
    for k0 in range(min(kernel, step)):
        r = (k0 * dilation - padding) % stride
        origin = (r + padding - k0 * dilation) // stride
        reach = (len(range(k0, kernel, step)) - 1) * spacing
        more = (beyond - r + stride - 1) // stride  # of the outputs s m + r, beyond one an input
        found.append(Phase(r, slice(k0, None, step), spacing, origin - reach, more + origin))
    return found


def _beyond(kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> int:
    """The output's size less stride times the input's."""
    return dilation * (kernel - 1) + 1 + output_padding - stride - 2 * padding


def geometry(op: str, name: str, size, kernel, stride, padding, output_padding, dilation):
    """Checked (OH, OW) of an input `name` of (H, W), and stride, padding, output_padding, dilation
    as pairs."""
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    padding = pair(op, "padding", padding, 0)
    output_padding = pair(op, "output_padding", output_padding, 0)
    if min(size) < 1:
        fail(op, name, "at least 1 x 1 in size", list(size))
    for axis in (0, 1):
        if output_padding[axis] >= max(stride[axis], dilation[axis]):
            fail(op, "output_padding", "smaller than stride or dilation", list(output_padding))
    out = [n * axis[1] + _beyond(*axis) for n, axis in zip(
        size, zip(kernel, stride, padding, output_padding, dilation, strict=True), strict=True)]
    if min(out) < 1:
        fail(op, "padding", "small enough for an output of at least 1 x 1", f"{list(padding)} and "
             f"an output of {out[0]} x {out[1]}")
    return out, stride, padding, output_padding, dilation


def check_binary_conv_transpose2d(
        input: Tensor, weight: Tensor, bias, stride, padding, output_padding, groups, dilation, *,
        scale, input_estimator, input_clip, weight_estimator, weight_clip, dtype):
    """Checked ((..., Cout, OH, OW), stride, padding, output_padding, dilation)."""
    op = "binary_conv_transpose2d"
    check_train(op, input, weight, None, None, input_estimator, input_clip, weight_estimator,
                weight_clip, dtype, 4)
    if input.dim() not in (3, 4):
        fail(op, "input", "(N, C, H, W) or (C, H, W)", describe(input))
    channels, per_group, *kernel = weight.shape
    if groups < 1 or channels % groups:
        fail(op, "groups", f"a divisor of {channels} input channels", groups)
    if input.shape[-3] != channels:
        fail(op, "input", f"{channels} channels wide for a weight of shape {tuple(weight.shape)}",
             f"{input.shape[-3]} channels in {describe(input)}")
    if min(weight.shape) < 1:
        fail(op, "weight", "of at least one channel and tap", describe(weight))
    check_same_device(op, input, bias=bias, scale=scale)
    check_channel_vector(op, "bias", bias, per_group * groups)
    check_channel_vector(op, "scale", scale, per_group * groups)
    size, *rest = geometry(op, "input", input.shape[-2:], kernel, stride, padding, output_padding,
                           dilation)
    return (*input.shape[:-3], per_group * groups, *size), *rest


def check_packed_conv_transpose2d(
        words: Tensor, weight_words: Tensor, channels: int, stride, padding, output_padding, groups,
        dilation, *, scale, bias, dtype):
    """Checked ((N, Cout, OH, OW), stride, padding, output_padding, dilation)."""
    op = "packed_conv_transpose2d"
    check_words(op, "words", words, channels, 4)
    check_groups(op, channels, weight_words.shape[0] if weight_words.dim() else 1, groups)
    check_words(op, "weight_words", weight_words, channels // groups, 4)
    check_same_device(op, words, weight_words=weight_words)
    cout, *kernel = weight_words.shape[:3]
    if min(cout, *kernel) < 1:
        fail(op, "weight_words", "of at least one channel and tap", describe(weight_words))
    size, *rest = geometry(op, "words", words.shape[1:3], kernel, stride, padding, output_padding,
                           dilation)
    shape = (words.shape[0], cout, *size)
    check_epilogue(op, words, shape, cout, scale=scale, bias=bias, dtype=dtype)
    return shape, *rest
