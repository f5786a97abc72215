"""What surrounds the convolution of a residual block in training, one pass over memory each.

Everything is rows by channels, channels innermost: tensors in other layouts are copied first.
Channel vectors come in any real type and count in float32. The arithmetic is the reference's, one
rounding a step; a float64 stream runs there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitkernels.backends.triton import elementwise, sums
from bitkernels.backends.triton.jit import block_index, vector
from bitkernels.ops.geometry import empty_real


@triton.jit
def positive(dot, RELU: tl.constexpr):
    if RELU:
        return tl.maximum(dot, 0)
    else:
        return dot


@triton.jit
def value(dot, residual, scale, bias, shift_in, c, col_ok, RELU: tl.constexpr):
    """reference._value of a tile; c and col_ok broadcast against it."""
    y = positive(dot, RELU).to(tl.float32) * vector(scale, c, col_ok, False)
    y = y + vector(bias, c, col_ok, False)
    y = y + residual.to(tl.float32)
    if shift_in is not None:
        y = y + vector(shift_in, c, col_ok, False)
    return y


@triton.jit
def block_forward_kernel(dot, residual, scale, bias, shift_in, slope, shift_out, out, rows,
                         channels, RELU: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    r = block_index(BLOCK_R, WIDE)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(r.dtype)[None, :]
    col_ok = c < channels
    ok = (r < rows) & col_ok
    at = r * channels + c
    y = value(tl.load(dot + at, mask=ok, other=0), tl.load(residual + at, mask=ok, other=0.0),
              scale, bias, shift_in, c, col_ok, RELU)
    if slope is not None:
        y = tl.where(y > 0, y, y * vector(slope, c, col_ok, False))
    if shift_out is not None:
        y = y + vector(shift_out, c, col_ok, False)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def block_backward_kernel(grad, dot, residual, scale, bias, shift_in, slope, center, out, partial,
                          rows, channels, tiles, RELU: tl.constexpr, STEPS: tl.constexpr,
                          BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    r = block_index(BLOCK_R, WIDE)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = column.to(r.dtype)[None, :]
    col_ok = c < channels
    middle = vector(center, c, col_ok, False)
    total_value = tl.zeros([BLOCK_C], tl.float64)
    total_norm = tl.zeros([BLOCK_C], tl.float64)
    total_slope = tl.zeros([BLOCK_C], tl.float64)
    total_grad = tl.zeros([BLOCK_C], tl.float64)
    for first in range(program, tiles, programs * STEPS):
        sum_value = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        sum_norm = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        sum_slope = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        sum_grad = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for _ in range(first, tl.minimum(first + programs * STEPS, tiles), programs):
            ok = (r < rows) & col_ok
            at = r * channels + c
            g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
            d = tl.load(dot + at, mask=ok, other=0)
            if slope is not None:
                y = value(d, tl.load(residual + at, mask=ok, other=0.0), scale, bias, shift_in, c,
                          col_ok, RELU)
                sum_slope += tl.where((y > 0) | ~ok, 0.0, g * y)
                sum_grad += g
                g = tl.where(y > 0, g, g * vector(slope, c, col_ok, False))
                tl.store(out + at, g.to(out.dtype.element_ty), mask=ok)
            sum_value += tl.where(ok, g, 0.0)
            sum_norm += tl.where(ok, g * (positive(d, RELU).to(tl.float32) - middle), 0.0)
            r += programs * BLOCK_R
        total_value += tl.sum(sum_value.to(tl.float64), axis=0)
        total_norm += tl.sum(sum_norm.to(tl.float64), axis=0)
        if slope is not None:
            total_slope += tl.sum(sum_slope.to(tl.float64), axis=0)
            total_grad += tl.sum(sum_grad.to(tl.float64), axis=0)
    to = partial + program * 4 * channels + column
    tl.store(to, total_value, mask=column < channels)
    tl.store(to + channels, total_norm, mask=column < channels)
    tl.store(to + 2 * channels, total_slope, mask=column < channels)
    tl.store(to + 3 * channels, total_grad, mask=column < channels)


@triton.jit
def norm_backward_kernel(grad, dot, p, q, r, center, out, rows, channels, RELU: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    row = block_index(BLOCK_R, WIDE)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(row.dtype)[None, :]
    col_ok = c < channels
    ok = (row < rows) & col_ok
    at = row * channels + c
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    dots = tl.load(dot + at, mask=ok, other=0)
    d = positive(dots, RELU).to(tl.float32) - vector(center, c, col_ok, False)
    y = g * vector(p, c, col_ok, False) + d * vector(q, c, col_ok, False)
    y = y + vector(r, c, col_ok, False)
    if RELU:
        y = tl.where(dots > 0, y, 0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


def rows_of(t: Tensor) -> Tensor:
    """The tensor in channels-last memory, itself if it is."""
    return t.contiguous(memory_format=torch.channels_last)


def size_of(t: Tensor) -> tuple[int, int]:
    """(rows, channels)."""
    return t.shape[0] * t.shape[2] * t.shape[3], t.shape[1]


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]


def _elementwise(kernel, dot: Tensor, real: Tensor, vectors, dtype: torch.dtype, relu: bool):
    """A kernel from (two of dot and real in its order, vectors) to a tensor of dtype."""
    out = empty_real(dot, dot.shape, dtype, True)
    rows, channels = size_of(dot)
    if rows and channels:
        dot, real = rows_of(dot), rows_of(real)
        pair = (dot, real) if kernel is block_forward_kernel else (real, dot)
        block_r, block_c = elementwise.tile_shape(1, channels)
        kernel[(triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))](
            *pair, *_vectors(*vectors), out, rows, channels, RELU=relu, BLOCK_R=block_r,
            BLOCK_C=block_c, WIDE=elementwise.wide(out), num_warps=4, enable_fp_fusion=False)
    return out


def residual_block_forward(dot, residual, scale, bias, shift_in, slope, shift_out, relu):
    vectors = (scale, bias, shift_in, slope, shift_out)
    return _elementwise(block_forward_kernel, dot, residual, vectors, residual.dtype, relu)


def residual_block_norm_backward(grad, dot, p, q, r, center, relu, dtype):
    return _elementwise(norm_backward_kernel, dot, grad, (p, q, r, center), dtype, relu)


def residual_block_backward(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    rows, channels = size_of(dot)
    out = grad.new_empty(0) if slope is None else empty_real(dot, dot.shape, grad.dtype, True)
    if not rows or not channels:
        return out, dot.new_zeros((4, channels), dtype=torch.float64)
    residual = None if slope is None else rows_of(residual)
    block_r, block_c = sums.tile_shape(1, channels)
    tiles = triton.cdiv(rows, block_r)
    partial = sums.partials(dot, tiles, 4, channels, dtype=torch.float64)
    block_backward_kernel[(len(partial), triton.cdiv(channels, block_c))](
        rows_of(grad), rows_of(dot), residual, *_vectors(scale, bias, shift_in, slope, center), out,
        partial, rows, channels, tiles, RELU=relu, STEPS=sums.STEPS, BLOCK_R=block_r,
        BLOCK_C=block_c, WIDE=elementwise.wide(dot), num_warps=4, enable_fp_fusion=False)
    return out, sums.reduce(partial)
