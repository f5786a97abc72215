"""packed_conv2d_moments: the convolution's integers, then their exact sums in a pass of their own.

The sums could be taken in the convolution's epilogue, from integers that are already in registers.
They are not: there are three convolution kernels, the registers of the 1-bit one are full, and each
would write partial sums that depend on its tile. The pass reads back what was written, 2 bytes an
element as int16, against the K / 8 bytes of words and filters that the convolution visits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.backends.triton import elementwise, passes, sums
from bitkernels.backends.triton.jit import tile_rows
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.packed_conv2d import packed_conv2d
from bitkernels.backends.triton.residual_block import positive, size_of


@triton.jit
def moments_kernel(dot, partial, rows, channels, tiles, RELU: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Sums, sums of squares and count of a program's tiles: int64 throughout."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = column.to(tl.int64 if WIDE else tl.int32)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.int64)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.int64)
    for tile in range(program, tiles, programs):
        r = tile_rows(tile, BLOCK_R, WIDE)
        d = tl.load(dot + r[:, None] * channels + c, mask=(r < rows)[:, None] & (c < channels),
                    other=0)
        d = positive(d, RELU).to(tl.int64)
        total += d
        squares += d * d
    to = partial + program * 3 * channels + column
    tl.store(to, tl.sum(total, axis=0), mask=column < channels)
    tl.store(to + channels, tl.sum(squares, axis=0), mask=column < channels)
    count = tl.where((column < channels) & (program == 0), rows, 0)
    tl.store(to + 2 * channels, count.to(tl.int64), mask=column < channels)


def moments(dot: Tensor, relu: bool) -> Tensor:
    """Sums, sums of squares and counts (3, C) of channels-last dot products."""
    rows, channels = size_of(dot)
    if not rows or not channels:
        return dot.new_zeros((3, channels), dtype=torch.int64)
    walk = passes.walk("moments", 1, rows, channels, elementwise.wide(dot))
    partial = dot.new_empty((walk.programs, 3, channels), dtype=torch.int64)
    launch(moments_kernel, (walk.programs, walk.blocks), (dot, partial, rows, channels, walk.tiles),
           (passes.PASSES["moments"].warps,), RELU=relu, BLOCK_R=walk.block_r,
           BLOCK_C=walk.block_c, WIDE=walk.wide)
    return sums.reduce(partial)


def packed_conv2d_moments(words, weight_words, channels, stride, padding, dilation, groups, *,
                          pad_value, out_channels, relu, dtype, sums=True, inner):
    dot, _ = packed_conv2d(words, weight_words, channels, stride, padding, dilation, groups,
                           pad_value=pad_value, out_channels=out_channels, dtype=dtype, inner=inner)
    return dot, moments(dot, relu) if sums else None
