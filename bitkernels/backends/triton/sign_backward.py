"""sign_backward: the estimator's slope at x + shift times a gradient, and its sums, in one pass.

Input, gradient and what is added may have any layout; one that takes more than two row dimensions
is copied first. float64 runs in the reference. swish_sign is within rounding of the reference,
which takes its exponentials from the library; the other estimators are equal to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import elementwise, sums
from bitkernels.backends.triton.jit import block_index, vector
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
def sign_backward_kernel(grad, x, shift, add, out, partial, clip, beta, rows, inner, channels,
                         tiles, go, gi, gc, so, si, sc, ao, ai, ac, oo, oi, oc,
                         ESTIMATOR: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr,
                         BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    r = block_index(BLOCK_R, WIDE)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = column.to(r.dtype)[None, :]
    col_ok = c < channels
    total = tl.zeros([BLOCK_C], tl.float64)
    for first in range(program, tiles, programs * STEPS):
        some = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for _ in range(first, tl.minimum(first + programs * STEPS, tiles), programs):
            ok = (r < rows) & col_ok
            outer, rest = r // inner, r % inner
            g = tl.load(grad + (outer * go + rest * gi + c * gc), mask=ok, other=0.0).to(tl.float32)
            if ESTIMATOR != IDENTITY:
                v = tl.load(x + (outer * so + rest * si + c * sc), mask=ok, other=0.0)
                v = v.to(tl.float32)
                if shift is not None:
                    v = v + vector(shift, c, col_ok, False)
                g = estimator_grad(g, v, clip, beta, ESTIMATOR)
            some += tl.where(ok, g, 0.0)
            if add is not None:
                g += tl.load(add + (outer * ao + rest * ai + c * ac), mask=ok,
                             other=0.0).to(tl.float32)
            tl.store(out + (outer * oo + rest * oi + c * oc), g.to(out.dtype.element_ty), mask=ok)
            r += programs * BLOCK_R
        total += tl.sum(some.to(tl.float64), axis=0)
    tl.store(partial + program * channels + column, total, mask=column < channels)


def sign_backward(grad, input, shift, add, estimator, clip, beta):
    out = empty_around(input, 1)
    operands = tuple(t for t in (grad, input, add) if t is not None)
    channels = input.shape[1]
    if not input.numel():
        return out, input.new_zeros((channels,), dtype=torch.float64)
    operands, outer, inner, strides = elementwise.together(1, out, *operands)
    if add is None:
        strides.insert(2, (0, 0, 0))
    else:
        add = operands[2]
    if clip is None and estimator == "ste_sign":
        estimator = "identity"
    rows = outer * inner
    block_r, block_c = sums.tile_shape(strides[1][2], channels)
    tiles = triton.cdiv(rows, block_r)
    partial = sums.partials(input, tiles, channels, dtype=torch.float64)
    sign_backward_kernel[(len(partial), triton.cdiv(channels, block_c))](
        *operands[:2], None if shift is None else shift.contiguous(), add, out, partial,
        0.0 if clip is None else float(clip), float(beta), rows, inner, channels, tiles,
        *(s for each in strides for s in each), ESTIMATOR=ESTIMATORS[estimator], STEPS=sums.STEPS,
        BLOCK_R=block_r, BLOCK_C=block_c, WIDE=elementwise.wide(*operands, out), num_warps=4,
        enable_fp_fusion=False)
    return out, sums.reduce(partial)
