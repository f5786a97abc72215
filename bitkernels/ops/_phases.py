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

from bitkernels.ops._checks import fail
from bitkernels.ops.geometry import pair


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


def transposed_geometry(op: str, name: str, size, kernel, stride, padding, output_padding,
                        dilation):
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
