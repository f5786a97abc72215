"""The quantizers' values and gradients: autograd Functions that keep as little as they can.

Each says with `exported` what `torch.export` records in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from bitkernels._dispatch import FirstOrder, apply, is_recorded, with_gradient_of
from bitkernels.ops._contract import estimator_grad, sign
from bitkernels.ops._training import estimated_grad
from bitkernels.ops.geometry import is_channels_last

_sign_pack_mask = torch.ops.bitkernels.sign_pack_mask.default
_mask_grad = torch.ops.bitkernels.mask_grad.default


def _value(x: Tensor, kind: str, threshold: Tensor | None) -> Tensor:
    if kind == "sign":
        return sign(x)
    if kind == "heaviside":
        return (x > 0).to(x.dtype)
    # sign(sign(x + t) + sign(x - t)) with sign(0) = 0, decided without rounding x + t and x - t.
    return (x >= threshold).to(x.dtype) - (x <= -threshold).to(x.dtype)  # type: ignore[operator]


def _innermost(x: Tensor) -> int:
    """The dimension along which mask bits are in the order of memory."""
    return 1 if is_channels_last(x) else -1


class StraightThrough(FirstOrder):
    """Gradient 1 where |x| <= clip (None: everywhere), saved as one bit an element.

    Returns the mask, too, packed; None without a clip.
    """

    operator = "a straight-through quantizer"
    generate_vmap_rule = True

    @staticmethod
    def forward(x, kind, clip, threshold):
        value = _value(x, kind, threshold)
        if clip is None or x.numel() == 0:
            return value, None
        return value, _sign_pack_mask(x.movedim(_innermost(x), -1).reshape(-1), clip)[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        mask = output[1]
        ctx.innermost = _innermost(inputs[0])
        ctx.save_for_backward(mask)
        if mask is not None:
            ctx.mark_non_differentiable(mask)

    @staticmethod
    def exported(x, kind, clip, threshold):
        passes = x.isfinite() if clip is None else x.isfinite() & (x.abs() <= clip)
        return with_gradient_of(_value(x, kind, threshold), torch.where(passes, x, 0.0)), None

    @staticmethod
    def backward(ctx, tensors, grad, _):
        (mask,) = tensors
        if mask is not None:
            grad = grad.movedim(ctx.innermost, -1)
            grad = _mask_grad(grad.reshape(-1), mask).view(grad.shape).movedim(-1, ctx.innermost)
        return grad, None, None, None


def straight_through(x: Tensor, kind: str, clip: float | None, threshold: Tensor | None = None):
    if (is_recorded("a straight-through quantizer", x) or torch.compiler.is_exporting()
            or torch.jit.is_tracing()):
        return apply(StraightThrough, x, kind, clip, threshold)[0]
    return _value(x, kind, threshold)


class EstimatedSign(FirstOrder):
    """Sign whose gradient needs x itself (approx_sign, swish_sign): a reference to x is saved."""

    operator = "the sign of approx_sign and swish_sign"
    generate_vmap_rule = True

    @staticmethod
    def forward(x, estimator, beta):
        return sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.estimator, ctx.beta = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def exported(x, estimator, beta):
        at = x.detach()
        slope = estimator_grad(torch.ones_like(at), at, estimator, None, beta)
        return with_gradient_of(sign(x), torch.where(slope != 0, x * slope, 0.0))

    @staticmethod
    def backward(ctx, tensors, grad):
        (x,) = tensors
        return estimated_grad(grad, x, ctx.estimator, ctx.beta), None, None


class Round(Function):
    """round(n x) / n, half to even, with the gradient of the identity."""

    operator = "the rounding of DoReFa"
    generate_vmap_rule = True

    @staticmethod
    def forward(x, n):
        return torch.round(x * n) / n

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def exported(x, n):
        return with_gradient_of(torch.round(x * n) / n, x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Clamp(Function):
    """x clamped to [low, high]."""

    operator = "quantizers.clamp"
    generate_vmap_rule = True

    @staticmethod
    def forward(x, low, high):
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def exported(x, low, high):
        inside = (x >= low) & (x <= high)
        return with_gradient_of(x.clamp(low, high), torch.where(inside, x, 0.0))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x >= ctx.low) & (x <= ctx.high)), None, None


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped to [low, high], the gradient 1 at both bounds, as TensorFlow has it.

    torch's own clamp has 1 there up to release 2.14 and 0 from 2.15 on.
    """
    return apply(_Clamp, x, low, high)
