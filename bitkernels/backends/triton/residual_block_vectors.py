"""All float64 arithmetic on the channels of a residual block in one launch a direction.

The order is the reference's, one rounding a step: sqrt and quotients of float64 are IEEE's. What
becomes 16 bits goes through float32, as PyTorch's casts do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.launch import launch
from bitkernels.ops.residual_block_vectors import fake_gradients, fake_statistics

BLOCK = 32  # channels a program, one a thread: what counts is the latency


@triton.jit
def double(ptr, c, ok):
    return tl.load(ptr + c, mask=ok, other=1.0).to(tl.float64)


@triton.jit
def store(ptr, c, value, ok):
    kind: tl.constexpr = ptr.dtype.element_ty
    if kind == tl.float64:
        tl.store(ptr + c, value, mask=ok)
    else:
        tl.store(ptr + c, value.to(tl.float32).to(kind), mask=ok)


@triton.jit
def statistics_kernel(moments, scale, weight, bias, vectors, mean, variance, channels,
                      EPS: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < channels
    total = double(moments, c, ok)
    squares = double(moments + channels, c, ok)
    count = double(moments + 2 * channels, c, ok)
    center = total / count
    spread = squares / count - center * center
    spread = tl.where(spread < 0, 0.0, spread)
    middle = center
    if scale is not None:
        alpha = double(scale, c, ok)
        middle = center * alpha
        spread = spread * alpha * alpha
    inverse = 1.0 / tl.sqrt(spread + EPS)
    factor = inverse
    if weight is not None:
        factor = inverse * double(weight, c, ok)
    normal = inverse
    slope = factor
    if scale is not None:
        normal = inverse * alpha
        slope = factor * alpha
    offset = -slope * center
    if bias is not None:
        offset = offset + double(bias, c, ok)
    less = count - 1
    unbiased = spread * (count / tl.where(less < 1, 1.0, less))
    store(vectors, c, center, ok)
    store(vectors + channels, c, factor, ok)
    store(vectors + 2 * channels, c, normal, ok)
    store(vectors + 3 * channels, c, slope, ok)
    store(vectors + 4 * channels, c, offset, ok)
    store(vectors + 5 * channels, c, count, ok)
    store(mean, c, middle, ok)
    store(variance, c, unbiased, ok)


@triton.jit
def gradients_kernel(sums, total, vectors, scale, pqr, norm_weight, norm_bias, shift_in, slope,
                     shift_out, channels, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = c < channels
    value = double(sums, c, ok)
    product = double(sums + channels, c, ok)
    normal = double(vectors + 2 * channels, c, ok)
    count = double(vectors + 5 * channels, c, ok)
    p = double(vectors + channels, c, ok)
    if scale is not None:
        p = p * double(scale, c, ok)
    q = -p * normal * normal * (double(total + channels, c, ok) / count)
    store(pqr, c, p, ok)
    store(pqr + channels, c, q, ok)
    store(pqr + 2 * channels, c, -p * (double(total, c, ok) / count), ok)
    store(norm_weight, c, product * normal, ok)
    store(norm_bias, c, value, ok)
    store(shift_in, c, value, ok)
    store(slope, c, double(sums + 2 * channels, c, ok), ok)
    store(shift_out, c, double(sums + 3 * channels, c, ok), ok)


def residual_block_statistics(moments, scale, weight, bias, eps, dtype):
    out = fake_statistics(moments, scale, weight, bias, eps, dtype)
    channels = moments.shape[1]
    if channels:
        vectors = (None if t is None else t.contiguous() for t in (scale, weight, bias))
        launch(statistics_kernel, (-(-channels // BLOCK), 1),
               (moments.contiguous(), *vectors, *out, channels), (1,), EPS=float(eps), BLOCK=BLOCK)
    return out


def residual_block_gradients(sums, total, vectors, scale, dtype):
    out = fake_gradients(sums, total, vectors, scale, dtype)
    channels = sums.shape[1]
    if channels:
        sums = sums.contiguous()
        launch(gradients_kernel, (-(-channels // BLOCK), 1),
               (sums, sums if total is None else total.contiguous(), vectors.contiguous(),
                None if scale is None else scale.contiguous(), *out, channels), (1,), BLOCK=BLOCK)
    return out
