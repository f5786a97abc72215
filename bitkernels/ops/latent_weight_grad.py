"""latent_weight_grad: from the gradient of a weight's signs to that of the weight."""

from __future__ import annotations

import torch

from bitkernels.ops._checks import (
    check_channel_vector,
    check_real,
    check_same_device,
    check_slope,
    describe,
    fail,
)
from bitkernels.ops._contract import estimator_grad, sign, wide
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, each


def check(grad, weight, scale=None, *, estimator="ste_sign", clip=1.0, beta=5.0,
          scale_weight_grad=True, wants_scale=False):
    op = "latent_weight_grad"
    check_real(op, "weight", weight)
    check_real(op, "grad", grad)
    if weight.dim() < 2:
        fail(op, "weight", "(Cout, ...)", describe(weight))
    check_same_device(op, weight, grad=grad, scale=scale)
    check_channel_vector(op, "scale", scale, weight.shape[0])
    check_slope(op, estimator, clip, beta)
    double = torch.float64
    if grad.shape != weight.shape or (grad.dtype == double) != (weight.dtype == double):
        fail(op, "grad", describe(weight), describe(grad))
    return Call((grad, weight, scale, estimator, clip, beta, scale_weight_grad, wants_scale))


def fake(grad, weight, scale, estimator, clip, beta, scale_weight_grad, wants_scale):
    of_scale = weight.new_empty(weight.shape[0] if wants_scale else 0, dtype=torch.float64)
    return torch.empty_like(weight), of_scale


def reference(grad, weight, scale, estimator, clip, beta, scale_weight_grad, wants_scale):
    """The gradient times the scale, rounded, times the estimator's slope at the weight; float64
    sums by output channel of the gradient times the weight's signs."""
    of_scale = (wide(grad) * sign(wide(weight))).flatten(1).double().sum(1)
    if scale is not None and scale_weight_grad:
        grad = grad * scale.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype)
    if estimator == "none":
        return torch.zeros_like(weight), of_scale[:len(of_scale) * wants_scale]
    slope = estimator_grad(wide(grad), wide(weight), estimator, clip, beta)
    return slope.to(weight.dtype), of_scale[:len(of_scale) * wants_scale]


def samples(v):
    shape, scale, half = (19, 70, 3, 3), v.real(19), torch.float16
    weight, grad = v.real(*shape), channels_last(v.real(*shape, dtype=half))
    return [
        Sample((grad, weight)),
        Sample((grad, weight, scale), dict(wants_scale=True), kernel={}),
        Sample((v.real(*shape), channels_last(weight.half()), scale.double()),
               dict(estimator="approx_sign", scale_weight_grad=False), kernel={}),
        Sample((v.real(5, 1200), v.real(5, 1200), v.real(5)),
               dict(estimator="none", clip=None, wants_scale=True), kernel={}),
        Sample((v.real(5, 1200).bfloat16(), v.real(5, 1200).half(), v.real(5)),
               dict(clip=None), kernel={}),
        Sample((grad, weight), dict(estimator="swish_sign", beta=1.5), kernel={})]


define(Operator(
    schemas=("latent_weight_grad(Tensor grad, Tensor weight, Tensor? scale=None, *, "
             "str estimator='ste_sign', float? clip=1.0, float beta=5.0, "
             "bool scale_weight_grad=True, bool wants_scale=False) -> (Tensor, Tensor)",),
    group="Training", check=check, fake=fake, reference=reference, samples=samples, batched=each,
    engine=False,
    text="""
The gradient of a latent weight, and of its scale, from that of its unscaled signs, in one pass.

Arguments:
  grad: of the signs, real (Cout, ...).
  weight: real, the shape of grad.
  scale: real (Cout,), a factor of the weight's gradient; None: 1.
  estimator: of the weight's sign: ste_sign, approx_sign, swish_sign, identity; none: a gradient
    of 0.
  clip: of ste_sign; None: no limit.
  beta: of swish_sign, above 0 and finite.
  scale_weight_grad: multiply by scale.
  wants_scale: return the scale's gradient.
Returns:
  (gradient in the weight's dtype and layout, float64 (Cout,): sums of grad times the weight's
  signs, or empty).
Errors:
  shapes, types or devices that do not fit, an unknown estimator, a clip below 0; tensors that
  require a gradient.
Example:
  >>> grad, weight = torch.ones(1, 3), torch.tensor([[0.5, -0.5, 2.0]])
  >>> of_weight, of_scale = ops.latent_weight_grad(
  ...     grad, weight, torch.tensor([3.0]), wants_scale=True)
  >>> of_weight.tolist(), of_scale.tolist()
  ([[3.0, 3.0, 0.0]], [1.0])
"""))
