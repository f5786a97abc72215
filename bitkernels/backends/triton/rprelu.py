"""rprelu and its backward, one pass over memory each.

The per-channel gradients are sums of two stages: every program of the backward adds the tiles it
walks in a fixed order and writes one partial row; a second kernel adds the partial rows in order.
No atomics, so the same input gives the same bits on every run. The number of programs depends on
the shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import passes
from bitkernels.backends.triton.elementwise import together, wide
from bitkernels.backends.triton.jit import block_index, row_offset, tile_rows
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.sums import COLUMNS, rows_at_once
from bitkernels.ops.geometry import empty_around


@triton.jit
def rprelu_kernel(x, shift_in, slope, shift_out, out, rows, inner, channels, so, si, sc, oo, oi, oc,
                  BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    r = block_index(BLOCK_R, WIDE)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(r.dtype)
    col_ok = c < channels
    ok = (r < rows)[:, None] & col_ok[None, :]
    at = row_offset(r, inner, so, si)[:, None] + (c * sc)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0)
    y = v.to(tl.float32) + tl.load(shift_in + c, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    y = tl.where(y > 0, y, y * tl.load(slope + c, mask=col_ok, other=0.0).to(tl.float32)[None, :])
    y = y + tl.load(shift_out + c, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    at = row_offset(r, inner, oo, oi)[:, None] + (c * oc)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def backward_tile(g, v, out, ok, inside, steep):
    """Of a loaded tile: what its three sums add. Stores the input's gradient at `out`."""
    g = g.to(tl.float32)
    y = v.to(tl.float32) + inside
    gx = tl.where(y > 0, g, g * steep)
    tl.store(out, gx.to(out.dtype.element_ty), mask=ok)
    return tl.where(ok, gx, 0.0), tl.where((y > 0) | ~ok, 0.0, g * y), g


@triton.jit
def rprelu_backward_kernel(grad, x, shift_in, slope, out, partial, rows, inner, channels, tiles,
                           go, gi, gc, so, si, sc, oo, oi, oc, STAGES: tl.constexpr,
                           BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64 if WIDE else tl.int32)
    col_ok = c < channels
    inside = tl.load(shift_in + c, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    steep = tl.load(slope + c, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    sum_in = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_slope = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in tl.range(program, tiles, 2 * programs, num_stages=STAGES):
        r = tile_rows(tile, BLOCK_R, WIDE)
        r2 = tile_rows(tile + programs, BLOCK_R, WIDE)
        ok = (r < rows)[:, None] & col_ok[None, :]
        ok2 = (r2 < rows)[:, None] & col_ok[None, :]
        at = row_offset(r, inner, go, gi)[:, None] + (c * gc)[None, :]
        at2 = row_offset(r2, inner, go, gi)[:, None] + (c * gc)[None, :]
        g, g2 = tl.load(grad + at, mask=ok, other=0.0), tl.load(grad + at2, mask=ok2, other=0.0)
        at = row_offset(r, inner, so, si)[:, None] + (c * sc)[None, :]
        at2 = row_offset(r2, inner, so, si)[:, None] + (c * sc)[None, :]
        v, v2 = tl.load(x + at, mask=ok, other=0.0), tl.load(x + at2, mask=ok2, other=0.0)
        at = row_offset(r, inner, oo, oi)[:, None] + (c * oc)[None, :]
        at2 = row_offset(r2, inner, oo, oi)[:, None] + (c * oc)[None, :]
        of_in, of_slope, of_out = backward_tile(g, v, out + at, ok, inside, steep)
        of_in2, of_slope2, of_out2 = backward_tile(g2, v2, out + at2, ok2, inside, steep)
        sum_in = sum_in + of_in + of_in2
        sum_slope = sum_slope + of_slope + of_slope2
        sum_out = sum_out + of_out + of_out2
    at = partial + program * 3 * channels + c
    tl.store(at, tl.sum(sum_in, axis=0), mask=col_ok)
    tl.store(at + channels, tl.sum(sum_slope, axis=0), mask=col_ok)
    tl.store(at + 2 * channels, tl.sum(sum_out, axis=0), mask=col_ok)


@triton.jit
def rprelu_reduce_kernel(partial, grad_in, grad_slope, grad_out, programs, channels,
                         BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program axis 1: which of the three gradients. At most BLOCK_P programs."""
    which = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    rows = tl.load(partial + ((3 * p + which) * channels)[:, None] + c[None, :],
                   mask=(p < programs)[:, None] & (c < channels)[None, :], other=0.0)
    value = tl.sum(rows, axis=0)
    tl.store(grad_in + c, value, mask=c < tl.where(which == 0, channels, 0))
    tl.store(grad_slope + c, value, mask=c < tl.where(which == 1, channels, 0))
    tl.store(grad_out + c, value, mask=c < tl.where(which == 2, channels, 0))


def rprelu(input, shift_in, slope, shift_out):
    out = empty_around(input, 1)
    (input,), outer, inner, [strides, out_strides] = together(1, out, input)
    channels = input.shape[1]
    if outer * inner and channels:
        block_r, block_c = passes.tile("rprelu", strides[2], channels)
        grid = (triton.cdiv(outer * inner, block_r), triton.cdiv(channels, block_c))
        launch(rprelu_kernel, grid,
               (input, shift_in.contiguous(), slope.contiguous(), shift_out.contiguous(), out,
                outer * inner, None if outer == 1 else inner, channels, *strides, *out_strides),
               (passes.PASSES["rprelu"].warps,), BLOCK_R=block_r, BLOCK_C=block_c,
               WIDE=wide(input, out))
    return out


def rprelu_backward(grad, input, shift_in, slope):
    out = empty_around(input, 1)
    (grad, input), outer, inner, [grad_strides, strides, out_strides] = together(
        1, out, grad, input)
    rows, channels = outer * inner, input.shape[1]
    new = input.new_empty if rows and channels else input.new_zeros
    # Three allocations: compiled graphs take outputs to be 16-byte aligned.
    sums = [new((channels,), dtype=torch.float32) for _ in range(3)]
    if rows and channels:
        way = passes.PASSES["rprelu_backward"]
        walk = passes.walk("rprelu_backward", strides[2], rows, channels, wide(grad, input, out))
        partial = input.new_empty((walk.programs, 3, channels), dtype=torch.float32)
        launch(rprelu_backward_kernel, (walk.programs, walk.blocks),
               (grad, input, shift_in.contiguous(), slope.contiguous(), out, partial, rows,
                None if outer == 1 else inner, channels, walk.tiles, *grad_strides, *strides,
                *out_strides), (way.warps,), STAGES=way.stages, BLOCK_R=walk.block_r,
               BLOCK_C=walk.block_c, WIDE=walk.wide)
        launch(rprelu_reduce_kernel, (-(-channels // COLUMNS), 3),
               (partial, *sums, walk.programs, channels), (8,),
               BLOCK_P=rows_at_once(walk.programs), BLOCK_C=COLUMNS)
    return out, *sums
