"""rsign: a sign with a learned shift."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._dispatch import FirstOrder, below_autograd, differentiate, in_memory_format
from bitkernels.ops._checks import check_channels, check_shift, check_slope
from bitkernels.ops._contract import shifted, sign
from bitkernels.ops._record import (
    Call,
    Operator,
    Sample,
    channels_last,
    define,
    images,
    inside,
    per_sample,
)
from bitkernels.ops._training import Signs, memory_format
from bitkernels.ops.geometry import empty_around

ops = torch.ops.bitkernels


def _check(input, shift, estimator, clip, beta):
    check_channels("rsign", input, **({"shift": shift} if shift.dim() == 1 else {}))
    check_shift("rsign", input, shift, 1)
    check_slope("rsign", estimator, clip, beta)


def check(input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    _check(input, shift, estimator, clip, beta)
    return Call((input, shift))


def fake(input, shift):
    return empty_around(input, 1)


def reference(input: Tensor, shift: Tensor) -> Tensor:
    return sign(shifted(input, shift, 1).movedim(-1, 1)).to(input.dtype)


class _RSign(FirstOrder):
    operator = "rsign"

    @staticmethod
    def onnx(input, shift, *_):
        return reference(input, shift)

    @staticmethod
    def call(input, shift, estimator, clip, beta):
        return ops.rsign.default(input, shift, estimator=estimator, clip=clip, beta=beta)

    @staticmethod
    def below(input, shift, *_):
        return ops.rsign.default(input, shift)

    @staticmethod
    def forward(ctx, input, shift, estimator, clip, beta):
        saved = input if estimator in ("approx_sign", "swish_sign") else None
        run = inside(input)
        with below_autograd():
            if estimator == "ste_sign" and clip is not None:
                saved = run("sign_pack_mask", input, clip, shift, 1)[1]
            out = run("rsign", input, shift)
        ctx.save_for_backward(saved, shift)
        ctx.conf, ctx.memory_format = (estimator, clip, beta), memory_format(input)
        return out

    @staticmethod
    def backward(ctx, tensors, grad):
        saved, shift = tensors
        estimator, clip, beta = ctx.conf
        if estimator == "none":
            return None, None, None, None, None
        if saved is not None and estimator != "ste_sign":
            per_sample = shift.dim() > 1
            if per_sample:  # as the N C channels of one sample, which sign_backward takes
                grad, saved = (t.flatten(0, 1).unsqueeze(0) for t in (grad, saved))
            grad_input, grad_shift = inside(grad)(
                "sign_backward", grad, saved, shift.flatten(), None, estimator, clip, beta)
            if per_sample:
                grad_input = in_memory_format(
                    grad_input.squeeze(0).unflatten(0, shift.shape[:2]), ctx.memory_format)
            return grad_input, grad_shift.to(shift.dtype).view(shift.shape), None, None, None
        grad = in_memory_format(grad, ctx.memory_format)
        grad_input = Signs.grad(grad, saved, estimator, beta, 1)
        grad_shift = None
        if ctx.needs_input_grad[1]:
            first = 0 if shift.dim() == 1 else 2  # per sample: over all but N and C
            reduce = [d for d in range(first, grad.dim()) if d != 1]
            grad_shift = grad_input.to(shift.dtype) if not reduce else grad_input.sum(
                reduce, dtype=shift.dtype)
            grad_shift = grad_shift.view(shift.shape)
        return grad_input, grad_shift, None, None, None


def autograd(input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    _check(input, shift, estimator, clip, beta)
    return differentiate(_RSign, (input, shift), estimator, clip, beta)


def samples(v):
    x, shift, each = v.leaf(2, 37, 5, 6), v.leaf(37), v.leaf(2, 37, 1, 1)
    half = channels_last(v.real(2, 70, 5, 6).half())
    return [
        Sample((x, shift)), Sample((channels_last(x), shift.detach()), dict(estimator="ste_sign")),
        Sample((x.detach()[:, :, 0, 0], shift), dict(estimator="identity")),
        Sample((channels_last(x), each)),
        Sample((v.leaf(2, 37), v.leaf(2, 37)), dict(estimator="identity")),
        *(Sample((t, v.real(*shape)), kernel={}) for t in (v.real(2, 70, 5, 6), half)
          for shape in ((70,), (2, 70, 1, 1)))]


define(Operator(
    schemas=("rsign(Tensor input, Tensor shift, *, str estimator='approx_sign', "
             "float? clip=1.0, float beta=5.0) -> Tensor",),
    group="Training", check=check, fake=fake, reference=reference, autograd=autograd,
    samples=samples, batched=per_sample(images("input")),
    text="""
sign(input + shift) with a learned shift: ReActNet's RSign. Differentiable in both.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, C, ...).
  shift: real (C,), or (N, C, 1, ..., 1): one a channel of each sample.
  estimator: the slope in the backward: ste_sign, approx_sign, swish_sign, identity or none.
  clip: of ste_sign; None: no limit.
  beta: of swish_sign, above 0 and finite.
Returns:
  -1 and +1, the shape and dtype of input; +1 unless input + shift < 0.
Errors:
  an input with another number of channels than the shift, a shift of another shape, fewer than two
  dimensions, integers, an unknown estimator.
Example:
  >>> ops.rsign(torch.tensor([[0.5, -0.5]]), torch.tensor([-1.0, 1.0])).tolist()
  [[-1.0, 1.0]]
"""))
