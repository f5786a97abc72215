"""Sums over rows in two stages, without atomics: the same input gives the same bits on every run.

The programs of a kernel each walk every `programs`-th tile, add what they see in a fixed order and
write one row of partial sums; `reduce_kernel` adds those rows in a fixed order. Float32 values are
added in float32 over at most `steps` tiles (passes.py) and in float64 beyond: float64 throughput is
low on most GPUs. How many programs there are depends on the shape alone.

The walks take two tiles a turn: the loads of both are issued before the first store, behind which
none would be moved. With stages, the next turns' loads are on their way to shared memory meanwhile,
where they take no registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.backends.triton.launch import launch

COLUMNS = 4  # of a reduction's program: few, for there are few programs to share the rows
MOST = 1024  # rows of one: a matrix product's many tiles take two reductions


@triton.jit
def add_rows(to, column, channels, values, more):
    """Adds a tile's columns to `to + column`, in its type, or puts them there if not `more`. A
    barrier must follow those of a turn: the next load may be another thread's.

    What a walk has so far stays in memory: its registers are needed for the loads in flight.
    """
    kind: tl.constexpr = to.dtype.element_ty
    before = tl.load(to + column, mask=column < tl.where(more, channels, 0), other=0)
    tl.store(to + column, before + tl.sum(values.to(kind), axis=0), mask=column < channels)


@triton.jit
def reduce_kernel(partial, out, programs, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial (programs, width) to out (chunks, width), a chunk being BLOCK_P programs."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = tl.load(partial + p[:, None] * width + c[None, :],
                   mask=(p < programs)[:, None] & (c < width)[None, :], other=0)
    total = tl.sum(rows, axis=0)
    if out.dtype.element_ty != partial.dtype.element_ty:  # to 16 bits by float32, as PyTorch does
        total = total.to(tl.float32)
    tl.store(out + tl.program_id(1) * width + c, total.to(out.dtype.element_ty), mask=c < width)


def rows_at_once(programs: int) -> int:
    """BLOCK_P of a reduction: all rows by one load, whose latency is most of the time."""
    return min(max(1 << (programs - 1).bit_length(), 32), MOST)


def reduce(partial: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over the first dimension, in a type of its own or in dtype."""
    chunks = -(-partial.shape[0] // MOST)
    if chunks > 1:
        first = partial.new_empty((chunks, *partial.shape[1:]))
        _reduce(partial, first, chunks)
        partial = first
    out = partial.new_empty(partial.shape[1:], dtype=dtype or partial.dtype)
    _reduce(partial, out, 1)
    return out


def _reduce(partial: Tensor, out: Tensor, chunks: int) -> None:
    programs, width = partial.shape[0], out.numel() // chunks
    launch(reduce_kernel, (-(-width // COLUMNS), chunks), (partial, out, programs, width), (8,),
           BLOCK_P=rows_at_once(programs), BLOCK_C=COLUMNS)
