"""sign_backward: a gradient times the slope of a sign's estimator."""

from __future__ import annotations

import torch

from bitkernels.ops._checks import (
    ESTIMATORS,
    check_real,
    check_same_device,
    check_slope,
    check_vectors,
    describe,
    fail,
)
from bitkernels.ops._contract import estimator_grad, per_channel, wide
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, each
from bitkernels.ops.geometry import empty_around


def check(grad, input, shift=None, add=None, *, estimator="ste_sign", clip=1.0, beta=5.0):
    op = "sign_backward"
    check_real(op, "input", input)
    check_real(op, "grad", grad)
    if input.dim() < 2:
        fail(op, "input", "(N, C, ...)", describe(input))
    check_vectors(op, input, input.shape[1], shift=shift)
    check_slope(op, estimator, clip, beta, ESTIMATORS[:-1])  # "none" has no slope
    check_same_device(op, input, grad=grad, add=add)
    wide = torch.float64
    if grad.shape != input.shape or (grad.dtype == wide) != (input.dtype == wide):
        fail(op, "grad", describe(input), describe(grad))
    if add is not None and (add.shape != input.shape or add.dtype != input.dtype):
        fail(op, "add", describe(input), describe(add))
    return Call((grad, input, shift, add, estimator, clip, beta))


def fake(grad, input, shift, add, estimator, clip, beta, dtype=torch.float64):
    return empty_around(input, 1), input.new_empty(input.shape[1], dtype=dtype)


def reference(grad, input, shift, add, estimator, clip, beta, dtype=torch.float64):
    """grad times the estimator's slope at input + shift, plus add; float64 sums of the product.

    dtype: in calls from `inside`, that of the sums.
    """
    x, g = wide(input), wide(grad)
    if shift is not None:
        x = x + per_channel(shift, input)
    g = estimator_grad(g, x, estimator, clip, beta)
    total = g if add is None else g + wide(add)
    of_shift = g.double().sum([d for d in range(g.dim()) if d != 1])
    return total.to(input.dtype), of_shift.to(dtype)


def samples(v):
    x, shape, half = v.real(2, 37, 5, 6), (2, 70, 5, 9), torch.float16
    real, stream, shift = v.real(*shape), v.real(*shape, dtype=half), v.real(70)
    grad = channels_last(v.real(*shape, dtype=half))
    return [
        Sample((x.half(), channels_last(x), v.real(37), x)),
        Sample((x, x), dict(estimator="approx_sign", clip=None)),
        Sample((grad, real, shift, real), dict(estimator="approx_sign", clip=None), kernel={}),
        Sample((real, stream), kernel={}),
        Sample((grad, channels_last(stream), shift, grad), dict(estimator="identity", clip=None),
               kernel={}),
        Sample((real, real, shift), dict(estimator="swish_sign", clip=None, beta=1.5), kernel={})]


define(Operator(
    schemas=("sign_backward(Tensor grad, Tensor input, Tensor? shift=None, Tensor? add=None, *, "
             "str estimator='ste_sign', float? clip=1.0, float beta=5.0) -> (Tensor, Tensor)",),
    group="Training", check=check, fake=fake, reference=reference, samples=samples, batched=each,
    text="""
A gradient times the slope of a sign's estimator, plus another gradient; and its sum per channel.

Arguments:
  grad: of the sign, real (N, C, ...).
  input: of the sign, real, the shape of grad.
  shift: real (C,), added to input; None: none.
  add: the shape and dtype of input, added to the result; None: none.
  estimator: ste_sign, approx_sign, swish_sign or identity.
  clip: of ste_sign; None: no limit.
  beta: of swish_sign, above 0 and finite.
Returns:
  (gradient in the dtype of input, float64 (C,): sums of grad times slope, the shift's gradient).
Errors:
  shapes or types that differ, an unknown estimator, a clip below 0.
Example:
  >>> grad, sums = ops.sign_backward(torch.ones(1, 2), torch.tensor([[0.5, 2.0]]))
  >>> grad.tolist(), sums.tolist()
  ([[1.0, 0.0]], [1.0, 0.0])
"""))
