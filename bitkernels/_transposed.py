"""Transposed convolutions as ordinary ones: checks, shape arithmetic and the phases of the output.

Along one axis, output y of a transposed convolution with stride s, padding p and dilation d is the
sum of x[i] w[k] over all taps k and inputs i with i s - p + k d = y. Outputs y = s m + r of one
phase r in [0, s) see the taps with k d = r + p (mod s). With g = gcd(s, d) there are none unless g
divides r + p; then they are k0, k0 + s / g, k0 + 2 s / g, ..., T of them below the kernel's size,
with k0 the least solution. Tap k0 + t s / g reads the input at

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
    check_same_device,
    check_train,
    describe,
    fail,
    pair,
)

OP = "binary_conv_transpose2d"


class Phase(NamedTuple):
    """Outputs first, first + stride, ... along one axis, for inputs of every size."""

    first: int
    taps: slice | None  # of the filter, to be reversed; None without taps
    dilation: int  # between taps, in the input
    more: int  # outputs beyond one an input, may be negative
    start: int  # the input under the first tap for the first output, may be negative
    end: int  # past the input under the last tap for the last output, counted from the input's end


def phases(kernel: int, stride: int, padding: int, output_padding: int,
           dilation: int) -> list[Phase]:
    """The phases along one axis, in order."""
    beyond = _beyond(kernel, stride, padding, output_padding, dilation)
    g = math.gcd(stride, dilation)
    step, spacing = stride // g, dilation // g
    found = []
    for r in range(stride):
        more = -((r - beyond) // stride)  # of the outputs s m + r below s * size + beyond
        k0 = next((k for k in range(min(kernel, step))
                   if (k * dilation - r - padding) % stride == 0), None)
        if k0 is None:
            found.append(Phase(r, None, 1, more, 0, 0))
            continue
        origin = (r + padding - k0 * dilation) // stride
        reach = (len(range(k0, kernel, step)) - 1) * spacing
        found.append(Phase(r, slice(k0, None, step), spacing, more, origin - reach, more + origin))
    return found


def _beyond(kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> int:
    """The output's size less stride times the input's."""
    return dilation * (kernel - 1) + 1 + output_padding - stride - 2 * padding


def output_size(op: str, size, kernel, stride, padding, output_padding, dilation) -> list[int]:
    """Checked (OH, OW) of an input of (H, W); the others are pairs too."""
    if min(size) < 1:
        fail(op, "input", "at least 1 x 1 in size", list(size))
    for axis in (0, 1):
        if output_padding[axis] >= max(stride[axis], dilation[axis]):
            fail(op, "output_padding", "smaller than stride or dilation", list(output_padding))
    out = [n * axis[1] + _beyond(*axis) for n, axis in zip(
        size, zip(kernel, stride, padding, output_padding, dilation, strict=True), strict=True)]
    if min(out) < 1:
        fail(op, "padding", "small enough for an output of at least 1 x 1", f"{list(padding)} and "
             f"an output of {out[0]} x {out[1]}")
    return out


def check_binary_conv_transpose2d(
        input: Tensor, weight: Tensor, bias, stride, padding, output_padding, groups, dilation, *,
        scale, input_estimator, input_clip, weight_estimator, weight_clip, dtype):
    """Checked ((..., Cout, OH, OW), stride, padding, output_padding, dilation)."""
    check_train(OP, input, weight, None, None, input_estimator, input_clip, weight_estimator,
                weight_clip, dtype, 4)
    if input.dim() not in (3, 4):
        fail(OP, "input", "(N, C, H, W) or (C, H, W)", describe(input))
    channels, per_group, *kernel = weight.shape
    if groups < 1 or channels % groups:
        fail(OP, "groups", f"a divisor of {channels} input channels", groups)
    if input.shape[-3] != channels:
        fail(OP, "input", f"{channels} channels wide for a weight of shape {tuple(weight.shape)}",
             f"{input.shape[-3]} channels in {describe(input)}")
    if min(weight.shape) < 1:
        fail(OP, "weight", "of at least one channel and tap", describe(weight))
    check_same_device(OP, input, bias=bias, scale=scale)
    check_channel_vector(OP, "bias", bias, per_group * groups)
    check_channel_vector(OP, "scale", scale, per_group * groups)
    stride, dilation = pair(OP, "stride", stride, 1), pair(OP, "dilation", dilation, 1)
    padding = pair(OP, "padding", padding, 0)
    output_padding = pair(OP, "output_padding", output_padding, 0)
    size = output_size(OP, input.shape[-2:], kernel, stride, padding, output_padding, dilation)
    shape = (*input.shape[:-3], per_group * groups, *size)
    return shape, stride, padding, output_padding, dilation
