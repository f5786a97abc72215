"""sign_backward: the estimator's slope at x + shift times a gradient, and its sums, in one pass.

Input, gradient and what is added may have any layout; one that takes more than two row dimensions
is copied first. float64 runs in the reference. swish_sign is within rounding of the reference,
which takes its exponentials from the library; the other estimators are equal to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import elementwise, passes, sums
from bitkernels.backends.triton.jit import row_offset, tile_rows, vector
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.sums import add_rows
from bitkernels.ops.geometry import empty_around

ESTIMATORS = {"identity": 0, "ste_sign": 1, "approx_sign": 2, "swish_sign": 3}
IDENTITY, STE, APPROX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def estimator_grad(g, x, clip, beta, ESTIMATOR: tl.constexpr):
    """reference.estimator_grad; where x is NaN it is 0."""
    if ESTIMATOR == STE:
        return tl.where(tl.abs(x) <= clip, g, 0.0)
    elif ESTIMATOR == APPROX:
        magnitude = tl.abs(x)
        return tl.where(magnitude <= 1, g * (2 - 2 * magnitude), 0.0)
    else:
        # By e = exp(-|beta x|): tanh is (1 - e) / (1 + e) and 1 + cosh is (1 + e)^2 / 2e.
        z = tl.abs(beta * x)
        e = tl.exp(-z)
        slope = beta * (2 - z * ((1 - e) / (1 + e))) * (2 * e / ((1 + e) * (1 + e)))
        return g * tl.where(z < 80, slope, 0.0)


@triton.jit
def sign_tile(g, v, a, out, ok, added, shift, add, clip, beta, ESTIMATOR: tl.constexpr):
    """Of a loaded tile: what its sum adds. Stores the input's gradient at `out`."""
    g = g.to(tl.float32)
    if ESTIMATOR != IDENTITY:
        v = v.to(tl.float32)
        if shift is not None:
            v = v + added
        g = estimator_grad(g, v, clip, beta, ESTIMATOR)
    some = tl.where(ok, g, 0.0)
    if add is not None:
        g = g + a.to(tl.float32)
    tl.store(out, g.to(out.dtype.element_ty), mask=ok)
    return some


@triton.jit
def sign_backward_kernel(grad, x, shift, add, out, partial, clip, beta, rows, inner, channels,
                         tiles, go, gi, gc, so, si, sc, ao, ai, ac, oo, oi, oc,
                         ESTIMATOR: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = column.to(tl.int64 if WIDE else tl.int32)[None, :]
    col_ok = c < channels
    added = tl.zeros([1, BLOCK_C], tl.float32)
    if shift is not None:
        added = vector(shift, c, col_ok)
    for first in range(program, tiles, programs * STEPS):
        some = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for tile in tl.range(first, tl.minimum(first + programs * STEPS, tiles), 2 * programs,
                             num_stages=STAGES):
            r = tile_rows(tile, BLOCK_R, WIDE)[:, None]
            r2 = tile_rows(tile + programs, BLOCK_R, WIDE)[:, None]
            ok, ok2 = (r < rows) & col_ok, (r2 < rows) & col_ok
            at, at2 = row_offset(r, inner, go, gi) + c * gc, row_offset(r2, inner, go, gi) + c * gc
            g, g2 = tl.load(grad + at, mask=ok, other=0.0), tl.load(grad + at2, mask=ok2, other=0.0)
            v, v2, a, a2 = g, g2, g, g2
            if ESTIMATOR != IDENTITY:
                at = row_offset(r, inner, so, si) + c * sc
                at2 = row_offset(r2, inner, so, si) + c * sc
                v = tl.load(x + at, mask=ok, other=0.0)
                v2 = tl.load(x + at2, mask=ok2, other=0.0)
            if add is not None:
                at = row_offset(r, inner, ao, ai) + c * ac
                at2 = row_offset(r2, inner, ao, ai) + c * ac
                a = tl.load(add + at, mask=ok, other=0.0)
                a2 = tl.load(add + at2, mask=ok2, other=0.0)
            to_out = out + (row_offset(r, inner, oo, oi) + c * oc)
            some += sign_tile(g, v, a, to_out, ok, added, shift, add, clip, beta, ESTIMATOR)
            to_out = out + (row_offset(r2, inner, oo, oi) + c * oc)
            some += sign_tile(g2, v2, a2, to_out, ok2, added, shift, add, clip, beta, ESTIMATOR)
        add_rows(partial + program * channels, column, channels, some, first > program)
        tl.debug_barrier()


def sign_backward(grad, input, shift, add, estimator, clip, beta, dtype=torch.float64):
    out = empty_around(input, 1)
    operands = tuple(t for t in (grad, input, add) if t is not None)
    channels = input.shape[1]
    if not input.numel():
        return out, input.new_zeros((channels,), dtype=dtype)
    operands, outer, inner, strides = elementwise.together(1, out, *operands)
    if add is None:
        strides.insert(2, (0, 0, 0))
    else:
        add = operands[2]
    if clip is None and estimator == "ste_sign":
        estimator = "identity"
    rows, way = outer * inner, passes.PASSES["sign_backward"]
    walk = passes.walk("sign_backward", strides[1][2], rows, channels,
                       elementwise.wide(*operands, out))
    partial = input.new_empty((walk.programs, channels), dtype=torch.float64)
    launch(sign_backward_kernel, (walk.programs, walk.blocks),
           (*operands[:2], None if shift is None else shift.contiguous(), add, out, partial,
            0.0 if clip is None else float(clip), float(beta), rows,
            None if outer == 1 else inner, channels, walk.tiles,
            *(s for each in strides for s in each)), (way.warps,),
           ESTIMATOR=ESTIMATORS[estimator], STEPS=way.steps, STAGES=way.stages,
           BLOCK_R=walk.block_r, BLOCK_C=walk.block_c, WIDE=walk.wide)
    return out, sums.reduce(partial, dtype)
