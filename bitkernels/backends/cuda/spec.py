"""What a kernel is compiled for: the integer constants of one call's shape, and its arguments.

`Spec` becomes `csrc/cuda/spec.cuh`; `Params` mirrors the struct of that name in types.cuh.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, fields, replace

import torch

TYPES = {None: 0, torch.int32: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4,
         torch.int16: 5}
VECTORS = ("scale", "bias", "shift_in", "slope", "shift_out", "sign_shift")


@dataclass(frozen=True)
class Spec:
    """Constants of a kernel, by their names in C++ (there in capitals)."""

    chunk: int  # bytes of one cp.async: 16, 8 or 4
    pixel: int  # bytes of a pixel
    k_bytes: int  # bytes of a window and of a filter
    channels: int
    cout: int
    kh: int = 1
    kw: int = 1
    h: int = 1
    w: int = 1
    oh: int = 1
    ow: int = 1
    sh: int = 1
    sw: int = 1
    pt: int = 0
    pl: int = 0
    dh: int = 1
    dw: int = 1
    # The most taps outside at each side, and whether some window is cut at both ends of an axis.
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    both_h: int = 0
    both_w: int = 0
    # Outputs and parts of the epilogue: a type of TYPES, or 0 and 1.
    out_type: int = 0
    nhwc: int = 1
    packed: int = 0
    residual: int = 0
    threshold: int = 0
    clamp_min: int = 0
    clamp_max: int = 0
    scale: int = 0
    bias: int = 0
    shift_in: int = 0
    slope: int = 0
    shift_out: int = 0
    sign_shift: int = 0
    windows: int = 0  # whether `prepare` counts the windows too
    # Of a resident kernel: bytes of the lines that a tile reads at most, pixels from one of them to
    # the next and before the first, lines from one image to the next, all with the borders; bytes
    # of a line's cp.async; 1 and 2: sums are taken, of the dot products or of their positive parts.
    image: int = 0
    wp: int = 1
    lead: int = 0
    hp: int = 1
    line_chunk: int = 4
    moments: int = 0
    # Where bulk copies bring the lines: how many images a tile touches at most, each a box of so
    # many lines; pixels from one box to the next.
    boxes: int = 0
    box_lines: int = 0
    box_step: int = 0

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Every call of a kernel asks for it several times."""
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @functools.cached_property
    def classes(self) -> int:
        def axis(before, past, both):
            return (before + 1) * (past + 1) if both else before + past + 1

        return (axis(self.top, self.bottom, self.both_h)
                * axis(self.left, self.right, self.both_w))

    @functools.cached_property
    def only_signs(self) -> bool:
        """Whether the epilogue is nothing but comparisons of the dot product."""
        real = any(getattr(self, name) for name in (*VECTORS, "residual", "clamp_min", "clamp_max"))
        return bool(not self.out_type and self.packed and (self.threshold or not real))

    @property
    def reach(self) -> tuple[int, int]:
        """Pixels past the images, down and right, that a window reads at most."""
        return (max(0, (self.oh - 1) * self.sh - self.pt + (self.kh - 1) * self.dh + 1 - self.h),
                max(0, (self.ow - 1) * self.sw - self.pl + (self.kw - 1) * self.dw + 1 - self.w))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def resident(self, rows: int, aligned: bool = True) -> Spec:
        """For a resident kernel with tiles of so many output pixels; aligned: the words, to 16.

        A border serves the image before it and the one after it, so it is as wide as the window
        that reaches furthest, on whichever side. A tile's lines go from the first that its first
        window reads to the last that its last one does; it may begin in the middle of an output
        row. Before them are the columns that the first line's windows read on the left.
        """
        down, right = self.reach
        hp, wp = self.h + max(down, self.pt), self.w + max(right, self.pl)
        hp = max(hp, (self.oh - 1) * self.sh)  # the next image's windows start no earlier
        lines = 0
        for first in range(self.oh):
            image, oh = divmod(first + (self.ow + rows - 2) // self.ow, self.oh)
            lines = max(lines, image * hp + (oh - first) * self.sh + (self.kh - 1) * self.dh + 1)
        chunk, lead = self.chunk, self.pl
        if aligned and self.pixel < 16 and 16 % self.pixel == 0 and self.w * self.pixel % 16 == 0:
            chunk, together = 16, 16 // self.pixel  # pixels; lines start where such copies may
            wp, lead = (-(-n // together) * together for n in (wp, lead))
        size = (lines * wp + lead) * self.pixel
        return replace(self, image=-(-size // 16) * 16, wp=wp, lead=lead, hp=hp, line_chunk=chunk)

    @property
    def place(self) -> int:
        """Bytes of a pixel, or of its part of a plane, where a resident kernel puts it."""
        return 16 if self.pixel % 16 == 0 else self.pixel

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def boxed(self, rows: int) -> Spec:
        """For a resident kernel with tiles of so many output pixels, whose lines bulk copies bring.

        A tile starts at a multiple of the greatest common divisor of its size and of an image's,
        and in a row at one of that of its size and of a row's. Boxes start at multiples of 128
        bytes, and so does what lies before each, zeros for the windows that begin outside.
        """
        _, right = self.reach
        image, least = self.oh * self.ow, 16 // math.gcd(16, self.pixel)
        wp = -(-(self.w + max(right, self.pl)) // least) * least
        spanned = (self.ow - math.gcd(rows, self.ow) + rows - 1) // self.ow
        lines = min(spanned, self.oh - 1) * self.sh + (self.kh - 1) * self.dh + 1
        boxes = (image - math.gcd(rows, image) + rows - 1) // image + 1
        together = math.lcm(128, self.place) // self.place
        lead = -(-self.pl // together) * together
        step = -(-(lead + lines * wp * self.pixel // self.place) // together) * together
        return replace(self, image=boxes * step * self.place, wp=wp, lead=lead, boxes=boxes,
                       box_lines=lines, box_step=step)

    def header(self) -> str:
        """spec.cuh."""
        lines = (f"constexpr int {f.name.upper()} = {getattr(self, f.name)};" for f in fields(self))
        return "#pragma once\n" + "\n".join(lines) + "\n"

    @functools.lru_cache(maxsize=4096)  # noqa: B019  specs are small and few
    def with_parts(self, *parts: tuple[str, int]) -> Spec:
        return replace(self, **dict(parts))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def for_preparation(self) -> Spec:
        """Without what `prepare` does not look at, so that calls share its compiled kernel."""
        plain = dict.fromkeys((*VECTORS, "out_type", "packed", "residual", "threshold", "clamp_min",
                               "clamp_max"), 0)
        return replace(self, chunk=16 if self.chunk == 16 else 4, nhwc=1, image=0, wp=1, lead=0,
                       hp=1, line_chunk=4, boxes=0, box_lines=0, box_step=0, **plain)


class Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "words", "filters", "out", "packed", "residual", *VECTORS, "threshold", "corr", "pa",
            "moments")),
        ("clamp_min", ctypes.c_float), ("clamp_max", ctypes.c_float),
        ("rows", ctypes.c_int), ("images", ctypes.c_int), ("settled", ctypes.c_int),
    ]


@functools.lru_cache(maxsize=4096)
def axis_border(size: int, out: int, kernel: int, stride: int, pad: int, step: int):
    """(most taps before the image, most past it, whether a window has both) along one axis."""
    most_before = most_past = both = 0
    for o in range(out):
        first = o * stride - pad
        before = min(-(-max(-first, 0) // step), kernel)
        past = kernel - min(-(-max(size - first, 0) // step), kernel)
        most_before, most_past = max(most_before, before), max(most_past, past)
        both |= before > 0 and past > 0
    return most_before, most_past, int(both)


@functools.lru_cache(maxsize=4096)
def conv_spec(shape, size, filters_shape, channels, stride, pad, dilation, chunk: int,
              pad_value: int = 0) -> Spec:
    """Of a convolution with `shape` (N, Cout, OH, OW), input `size` and filters in words.

    Padding with -1 reads zeros outside the image, as padding with 0 does, but counts every tap: it
    has one border class, whose windows are whole.
    """
    _, cout, oh, ow = shape
    _, kh, kw, depth = filters_shape
    top, bottom, both_h = axis_border(size[0], oh, kh, stride[0], pad[0], dilation[0])
    left, right, both_w = axis_border(size[1], ow, kw, stride[1], pad[2], dilation[1])
    if pad_value == -1:
        top = bottom = both_h = left = right = both_w = 0
    return Spec(chunk=chunk, pixel=4 * depth, k_bytes=4 * depth * kh * kw, channels=channels,
                cout=cout, kh=kh, kw=kw, h=size[0], w=size[1], oh=oh, ow=ow, sh=stride[0],
                sw=stride[1], pt=pad[0], pl=pad[2], dh=dilation[0], dw=dilation[1], top=top,
                bottom=bottom, left=left, right=right, both_h=both_h, both_w=both_w)


@functools.lru_cache(maxsize=4096)
def linear_spec(width: int, cout: int, channels: int, chunk: int) -> Spec:
    return Spec(chunk=chunk, pixel=4 * width, k_bytes=4 * width, channels=channels, cout=cout)
