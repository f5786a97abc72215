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

from bitkernels.backends.triton import elementwise, passes, sums
from bitkernels.backends.triton.jit import as_float8, tile_rows, vector
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.sums import add_rows
from bitkernels.ops.geometry import empty_real


@triton.jit
def positive(dot, RELU: tl.constexpr):
    if RELU:
        return tl.maximum(dot, 0)
    else:
        return dot


@triton.jit
def value(dot, residual, scale, bias, inside, shift_in, RELU: tl.constexpr):
    """reference._value of a tile, by vectors that broadcast against it; inside: values of shift_in.
    """
    y = positive(dot, RELU).to(tl.float32) * scale
    y = y + bias
    y = y + residual.to(tl.float32)
    if shift_in is not None:
        y = y + inside
    return y


@triton.jit
def forward_tile(d, x, out, ok, scale, bias, inside, steep, last, shift_in, slope, shift_out,
                 RELU: tl.constexpr):
    y = value(d, x, scale, bias, inside, shift_in, RELU)
    if slope is not None:
        y = tl.where(y > 0, y, y * steep)
    if shift_out is not None:
        y = y + last
    tl.store(out, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def block_forward_kernel(dot, residual, scale, bias, shift_in, slope, shift_out, out, rows,
                         channels, tiles, RELU: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64 if WIDE else tl.int32)
    c = c[None, :]
    col_ok = c < channels
    factor, added = vector(scale, c, col_ok), vector(bias, c, col_ok)
    inside, steep, last = added, added, added
    if shift_in is not None:
        inside = vector(shift_in, c, col_ok)
    if slope is not None:
        steep = vector(slope, c, col_ok)
    if shift_out is not None:
        last = vector(shift_out, c, col_ok)
    for tile in range(program, tiles, 2 * programs):
        r = tile_rows(tile, BLOCK_R, WIDE)[:, None]
        r2 = tile_rows(tile + programs, BLOCK_R, WIDE)[:, None]
        ok, ok2 = (r < rows) & col_ok, (r2 < rows) & col_ok
        at, at2 = r * channels + c, r2 * channels + c
        d, d2 = tl.load(dot + at, mask=ok, other=0), tl.load(dot + at2, mask=ok2, other=0)
        x = tl.load(residual + at, mask=ok, other=0.0)
        x2 = tl.load(residual + at2, mask=ok2, other=0.0)
        forward_tile(d, x, out + at, ok, factor, added, inside, steep, last, shift_in, slope,
                     shift_out, RELU)
        forward_tile(d2, x2, out + at2, ok2, factor, added, inside, steep, last, shift_in, slope,
                     shift_out, RELU)


@triton.jit
def backward_tile(g, d, x, out, ok, scale, bias, inside, steep, middle, shift_in, slope,
                  RELU: tl.constexpr):
    """Of a loaded tile: what its four sums add. Stores the value's gradient at `out`."""
    g = g.to(tl.float32)
    of_slope = g
    of_grad = g
    if slope is not None:
        y = value(d, x, scale, bias, inside, shift_in, RELU)
        of_slope = tl.where((y > 0) | ~ok, 0.0, g * y)
        g = tl.where(y > 0, g, g * steep)
        tl.store(out, g.to(out.dtype.element_ty), mask=ok)
    of_norm = tl.where(ok, g * (positive(d, RELU).to(tl.float32) - middle), 0.0)
    return tl.where(ok, g, 0.0), of_norm, of_slope, of_grad


@triton.jit
def block_backward_kernel(grad, dot, residual, scale, bias, shift_in, slope, center, out, partial,
                          rows, channels, tiles, RELU: tl.constexpr, STEPS: tl.constexpr,
                          STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                          WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = column.to(tl.int64 if WIDE else tl.int32)[None, :]
    col_ok = c < channels
    middle = vector(center, c, col_ok)
    factor, added, inside, steep = middle, middle, middle, middle
    if slope is not None:
        factor, added = vector(scale, c, col_ok), vector(bias, c, col_ok)
        steep = vector(slope, c, col_ok)
        if shift_in is not None:
            inside = vector(shift_in, c, col_ok)
    to = partial + program * 4 * channels
    for first in range(program, tiles, programs * STEPS):
        sum_value = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        sum_norm = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        sum_slope = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        sum_grad = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for tile in tl.range(first, tl.minimum(first + programs * STEPS, tiles), 2 * programs,
                             num_stages=STAGES):
            r = tile_rows(tile, BLOCK_R, WIDE)[:, None]
            r2 = tile_rows(tile + programs, BLOCK_R, WIDE)[:, None]
            ok, ok2 = (r < rows) & col_ok, (r2 < rows) & col_ok
            at, at2 = r * channels + c, r2 * channels + c
            g = tl.load(grad + at, mask=ok, other=0.0)
            d = tl.load(dot + at, mask=ok, other=0)
            g2 = tl.load(grad + at2, mask=ok2, other=0.0)
            d2 = tl.load(dot + at2, mask=ok2, other=0)
            x, x2 = g, g2
            if slope is not None:
                x = tl.load(residual + at, mask=ok, other=0.0)
                x2 = tl.load(residual + at2, mask=ok2, other=0.0)
            v, n, s, o = backward_tile(g, d, x, out + at, ok, factor, added, inside, steep, middle,
                                       shift_in, slope, RELU)
            v2, n2, s2, o2 = backward_tile(g2, d2, x2, out + at2, ok2, factor, added, inside, steep,
                                           middle, shift_in, slope, RELU)
            sum_value = sum_value + v + v2
            sum_norm = sum_norm + n + n2
            if slope is not None:
                sum_slope = sum_slope + s + s2
                sum_grad = sum_grad + o + o2
        more = first > program
        add_rows(to, column, channels, sum_value, more)
        add_rows(to + channels, column, channels, sum_norm, more)
        add_rows(to + 2 * channels, column, channels, sum_slope, more)
        add_rows(to + 3 * channels, column, channels, sum_grad, more)
        tl.debug_barrier()


@triton.jit
def norm_tile(g, dots, out, at, ok, p, q, r, middle, factor, scale, rounded, RELU: tl.constexpr):
    d = positive(dots, RELU).to(tl.float32) - middle
    y = g.to(tl.float32) * p + d * q
    y = y + r
    if RELU:
        y = tl.where(dots > 0, y, 0.0)
    y = y.to(out.dtype.element_ty)
    tl.store(out + at, y, mask=ok)
    if rounded is not None:
        if scale is not None:
            y = (y.to(tl.float32) * factor).to(out.dtype.element_ty)
        tl.store(rounded + at, as_float8(y), mask=ok)


@triton.jit
def norm_backward_kernel(grad, dot, p, q, r, center, scale, out, rounded, rows, channels, tiles,
                         RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                         WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64 if WIDE else tl.int32)
    c = c[None, :]
    col_ok = c < channels
    of_grad, of_dot = vector(p, c, col_ok), vector(q, c, col_ok)
    added, middle = vector(r, c, col_ok), vector(center, c, col_ok)
    factor = middle
    if scale is not None:
        factor = vector(scale, c, col_ok).to(out.dtype.element_ty).to(tl.float32)
    for tile in range(program, tiles, 2 * programs):
        row = tile_rows(tile, BLOCK_R, WIDE)[:, None]
        row2 = tile_rows(tile + programs, BLOCK_R, WIDE)[:, None]
        ok, ok2 = (row < rows) & col_ok, (row2 < rows) & col_ok
        at, at2 = row * channels + c, row2 * channels + c
        g, g2 = tl.load(grad + at, mask=ok, other=0.0), tl.load(grad + at2, mask=ok2, other=0.0)
        d, d2 = tl.load(dot + at, mask=ok, other=0), tl.load(dot + at2, mask=ok2, other=0)
        norm_tile(g, d, out, at, ok, of_grad, of_dot, added, middle, factor, scale, rounded, RELU)
        norm_tile(g2, d2, out, at2, ok2, of_grad, of_dot, added, middle, factor, scale, rounded,
                  RELU)


def rows_of(t: Tensor) -> Tensor:
    """The tensor in channels-last memory, itself if it is."""
    return t.contiguous(memory_format=torch.channels_last)


def size_of(t: Tensor) -> tuple[int, int]:
    """(rows, channels)."""
    return t.shape[0] * t.shape[2] * t.shape[3], t.shape[1]


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]


def _elementwise(name: str, kernel, operands: tuple[Tensor, Tensor], vectors, dtype: torch.dtype,
                 relu: bool, *more: Tensor | None):
    """A kernel from (operands, vectors) to a tensor of dtype, and `more`."""
    out = empty_real(operands[0], operands[0].shape, dtype, True)
    rows, channels = size_of(out)
    if rows and channels:
        walk = passes.walk(name, 1, rows, channels, elementwise.wide(out))
        launch(kernel, (walk.programs, walk.blocks),
               (*map(rows_of, operands), *_vectors(*vectors), out, *more, rows, channels,
                walk.tiles),
               (passes.PASSES[name].warps,), RELU=relu, BLOCK_R=walk.block_r, BLOCK_C=walk.block_c,
               WIDE=walk.wide)
    return out


def residual_block_forward(dot, residual, scale, bias, shift_in, slope, shift_out, relu):
    vectors = (scale, bias, shift_in, slope, shift_out)
    return _elementwise("block_forward", block_forward_kernel, (dot, residual), vectors,
                        residual.dtype, relu)


def residual_block_norm_backward(grad, dot, p, q, r, center, relu, dtype, scale=None,
                                 rounded=None):
    return _elementwise("norm_backward", norm_backward_kernel, (grad, dot),
                        (p, q, r, center, scale), dtype, relu, rounded)


def residual_block_backward(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    rows, channels = size_of(dot)
    out = grad.new_empty(0) if slope is None else empty_real(dot, dot.shape, grad.dtype, True)
    if not rows or not channels:
        return out, dot.new_zeros((4, channels), dtype=torch.float64)
    residual = None if slope is None else rows_of(residual)
    way = passes.PASSES["block_backward"]
    walk = passes.walk("block_backward", 1, rows, channels, elementwise.wide(dot))
    partial = dot.new_empty((walk.programs, 4, channels), dtype=torch.float64)
    launch(block_backward_kernel, (walk.programs, walk.blocks),
           (rows_of(grad), rows_of(dot), residual,
            *_vectors(scale, bias, shift_in, slope, center), out, partial, rows, channels,
            walk.tiles), (way.warps,), RELU=relu, STEPS=way.steps, STAGES=way.stages,
           BLOCK_R=walk.block_r, BLOCK_C=walk.block_c, WIDE=walk.wide)
    return out, sums.reduce(partial)
