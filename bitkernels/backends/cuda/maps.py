"""Tensor maps: how bulk tensor copies see the operands of a kernel. Sizes and strides, no memory.

A map says where the elements of a tensor of up to five dimensions lie, and what a copy takes of it,
a box; what of a box lies outside the tensor is written as zeros.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from bitkernels.backends.cuda.spec import Spec

MOST_BOX = 256  # elements of a box along one dimension
MOST_SIZE, MOST_STRIDE = 2**32, 2**40
UNIT = 16  # bytes, of which strides and the rows of a box are multiples


class Geometry(NamedTuple):
    """The innermost dimension first; strides, in bytes, of the others. swizzled: rows of 128 bytes,
    whose 16-byte pieces are permuted as wgmma reads them."""

    element: int  # bytes
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = False

    @property
    def legal(self) -> bool:
        """Whether the driver takes it, at an address that is a multiple of 16."""
        return (all(0 < n <= MOST_SIZE for n in self.sizes)
                and all(n % UNIT == 0 and n < MOST_STRIDE for n in self.strides)
                and all(0 < n <= MOST_BOX for n in self.box)
                and self.box[0] * self.element % UNIT == 0)


@functools.lru_cache(maxsize=4096)
def matrix(rows: int, width: int, box: int) -> Geometry:
    """Boxes of `box` rows by 128 bytes of (rows, width bytes)."""
    return Geometry(1, (width, rows), (width,), (128, box), swizzled=True)


@functools.lru_cache(maxsize=4096)
def filters(spec: Spec, bn: int) -> Geometry | None:
    """Boxes of `bn` filters by 128 bytes, in the order that a resident kernel multiplies them
    (`channel_of` in layout.cuh): row 32 q + 8 j + 2 t + i is channel 32 q + 8 t + 2 j + i. None
    where the kernel copies them itself (`by_map` in filters.cuh)."""
    if spec.chunk != 16 or spec.cout % 32:
        return None
    k = spec.k_bytes
    return Geometry(1, (k, 2, 4, 4, spec.cout // 32), (k, 8 * k, 2 * k, 32 * k),
                    (128, 2, 4, 4, bn // 32), swizzled=True)


@functools.lru_cache(maxsize=4096)
def lines(spec: Spec, images: int) -> Geometry:
    """Boxes of `spec.box_lines` lines of an image, `spec.wp` pixels each. Pixels of several times
    16 bytes come as planes of 16 bytes, others as they lie in memory."""
    line, image = spec.w * spec.pixel, spec.h * spec.w * spec.pixel
    if spec.pixel % 16 == 0 and spec.pixel > 16:
        planes = spec.pixel // 16
        return Geometry(1, (16, spec.w, spec.h, planes, images), (spec.pixel, line, 16, image),
                        (16, spec.wp, spec.box_lines, planes, 1))
    element = math.gcd(8, spec.pixel)
    return Geometry(element, (line // element, spec.h, images), (line, image),
                    (spec.wp * spec.pixel // element, spec.box_lines, 1))
