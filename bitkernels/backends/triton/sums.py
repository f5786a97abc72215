"""Sums over rows in two stages, without atomics: the same input gives the same bits on every run.

The programs of a kernel each walk every `programs`-th tile, add what they see in a fixed order and
write one row of partial sums; `reduce_kernel` adds those rows in order. Float32 values are added in
float32 over at most STEPS tiles and in float64 beyond, where every sum of STEPS is exact: float64
throughput is low on most GPUs. How many programs there are depends on the shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIALS = 512  # rows of partial sums at most: about four programs for each of 132 processors
STEPS = 16


def tile_shape(channel_stride: int, channels: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C): 1024 elements, which leaves registers for several sums of each."""
    if channel_stride != 1:
        return 128, 8
    block_c = min(max(32, 1 << (channels - 1).bit_length()), 128)
    return 1024 // block_c, block_c


@triton.jit
def reduce_kernel(partial, out, programs, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial (programs, width) to out (width,), in partial's type."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], partial.dtype.element_ty)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += tl.load(partial + p[:, None] * width + c[None, :],
                         mask=(p < programs)[:, None] & (c < width)[None, :], other=0)
    tl.store(out + c, tl.sum(total, axis=0), mask=c < width)


def reduce(partial: Tensor) -> Tensor:
    """The sum over the first dimension."""
    out = partial.new_empty(partial.shape[1:])
    reduce_kernel[(triton.cdiv(out.numel(), 32),)](
        partial, out, partial.shape[0], out.numel(), BLOCK_P=32, BLOCK_C=32, num_warps=4,
        enable_fp_fusion=False)
    return out


def partials(like: Tensor, tiles: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Room for one row of partial sums a program; as many programs as its first dimension."""
    return like.new_empty((min(tiles, PARTIALS), *shape), dtype=dtype)
