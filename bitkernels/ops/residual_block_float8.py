"""residual_block_norm_backward_float8: the gradient of a block's convolution, also in float8.

float8_e5m2 has 2 bits of mantissa and the range of float16. A value is rounded by at most an eighth
of itself from 2^-14 on, where float16 has its normal numbers, by at most 2^-17 below, and is
infinite from 61440 on: training needs a GradScaler, as in float16.
"""

from __future__ import annotations

import torch

from bitkernels.ops._checks import HALVES, describe, fail
from bitkernels.ops._contract import as_rows, per_channel
from bitkernels.ops._record import Call, Operator, Sample, define, each
from bitkernels.ops.geometry import empty_real
from bitkernels.ops.residual_block import (
    PassInputs,
    check_norm,
    fake_norm_backward,
    reference_norm_backward,
)

FLOAT8 = torch.float8_e5m2


def check_half(op: str, dtype: torch.dtype) -> None:
    if dtype not in HALVES:
        fail(op, "dtype", "float16 or bfloat16", dtype)


def check(grad, dot, p, q, r, center, scale, relu, dtype):
    op = "residual_block_norm_backward_float8"
    check_norm(op, grad, dot, p=p, q=q, r=r, center=center, scale=scale)
    check_half(op, dtype)
    if grad.dtype == torch.float64:
        fail(op, "grad", "float32, float16 or bfloat16", describe(grad))
    return Call((grad, dot, p, q, r, center, scale, relu, dtype))


def fake(grad, dot, p, q, r, center, scale, relu, dtype):
    out = fake_norm_backward(grad, dot, p, q, r, center, relu, dtype)
    return out, empty_real(dot, dot.shape, FLOAT8, True)


def reference(grad, dot, p, q, r, center, scale, relu, dtype):
    """residual_block_norm_backward; and that times the scale, both of this type, in float8."""
    out = reference_norm_backward(grad, dot, p, q, r, center, relu, dtype)
    scaled = out if scale is None else (
        out.float() * per_channel(scale.to(dtype), out)).to(dtype)
    return out, as_rows(scaled.to(FLOAT8))


def samples(v):
    i = PassInputs(v)
    one, zero = torch.ones(70), torch.zeros(70)  # by which nothing is rounded in bfloat16
    return [Sample((i.grad, i.dot, *i.c[:4], i.wide[4], True, torch.float16), kernel={}),
            Sample((i.real, i.dot.int(), one, one, zero, zero, None, False, torch.bfloat16),
                   kernel={})]


define(Operator(
    schemas=("residual_block_norm_backward_float8(Tensor grad, Tensor dot, Tensor p, Tensor q, "
             "Tensor r, Tensor center, Tensor? scale, bool relu, ScalarType dtype)"
             " -> (Tensor, Tensor)",),
    group="The residual block", check=check, fake=fake, reference=reference,
    samples=samples, batched=each, engine=False,
    text="""
residual_block_norm_backward, and its result times a scale once more in float8.

Arguments:
  grad: real, the shape of dot.
  dot: int16 or int32 (N, C, H, W).
  p: real (C,).
  q: real (C,).
  r: real (C,).
  center: real (C,).
  scale: real (C,), a factor of the second result; None: 1.
  relu: take max(dot, 0), and 0 where dot <= 0.
  dtype: of the first result: float16 or bfloat16.
Returns:
  (p grad + q (dot - center) + r in dtype, that times scale in float8_e5m2), the shape of dot,
  channels-last.
Errors:
  shapes, types or devices that do not fit; tensors that require a gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero, grad = torch.ones(2), torch.zeros(2), torch.full((1, 2, 1, 1), 1.1)
  >>> out, rounded = ops.residual_block_norm_backward_float8(
  ...     grad, dot, one, zero, zero, zero, None, False, torch.bfloat16)
  >>> out.flatten().tolist(), rounded.flatten().tolist()
  ([1.1015625, 1.1015625], [1.0, 1.0])
"""))
