"""What the trained operators share: signs in the backward, estimators, gradients of weights.

For the backward they keep packed bits (the signs of the input and the mask |x| <= clip: 2 bits an
element), never a real copy; only estimators that need |x| itself (approx_sign, swish_sign) keep a
reference to the input. The real part of the backward reads those bits by tables on CPUs where that
is faster (`_conv2d_backward.py`), else it is `aten.convolution_backward` on operands expanded from
them.

Estimators of d sign(x) / dx (Larq's names, plus the two trivial ones):
  ste_sign     1 where |x| <= clip (clip None: everywhere)
  approx_sign  2 - 2|x| where |x| <= 1 (Bi-Real Net)
  swish_sign   beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)) (BNN+)
  identity     1
  none         no gradient
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitkernels.ops._checks import (
    REAL,
    check_beta,
    check_channel_vector,
    check_clip,
    check_estimator,
    check_real,
    check_same_device,
    fail,
)
from bitkernels.ops._record import inside
from bitkernels.ops.geometry import is_channels_last

ops = torch.ops.bitkernels
SHORT_PLANE = 196  # pixels of a channel, from which on sums by channel cost `estimated_grad` little

SCHEMA = (
    "Tensor? scale=None, str input_estimator='ste_sign', float? input_clip=1.0, "
    "str weight_estimator='ste_sign', float? weight_clip=1.0, float beta=5.0, "
    "bool scale_weight_grad=True, ScalarType? dtype=None"
)
TEXT = """\
  scale: (Cout,) real, a factor of each output channel; None: none.
  input_estimator: the slope of the input's sign in the backward: ste_sign, approx_sign,
    swish_sign, identity or none.
  input_clip: of ste_sign: the slope is 1 where |input| <= input_clip; None: everywhere.
  weight_estimator: the same for the weight.
  weight_clip: the same for the weight.
  beta: of swish_sign, above 0 and finite.
  scale_weight_grad: multiply the weight's gradient with scale too.
  dtype: of the result; None: the input's.
"""


class Estimators(NamedTuple):
    """How an operator trains, and the type of its result; checked where it is entered."""

    input_estimator: str = "ste_sign"
    input_clip: float | None = 1.0
    weight_estimator: str = "ste_sign"
    weight_clip: float | None = 1.0
    beta: float = 5.0
    scale_weight_grad: bool = True
    dtype: torch.dtype | None = None

    def keywords(self) -> dict[str, Any]:
        """As the operators take them."""
        return self._asdict()

    def of_input(self, wanted: bool) -> str:
        return self.input_estimator if wanted else "none"


@functools.lru_cache(256)
def _estimators(op: str, **given) -> Estimators:
    """Checked; remembered, since every call of a layer gives the same."""
    train = Estimators(**given)
    check_estimator(op, "input_estimator", train.input_estimator)
    check_estimator(op, "weight_estimator", train.weight_estimator)
    check_clip(op, "input_clip", train.input_clip)
    check_clip(op, "weight_clip", train.weight_clip)
    check_beta(op, train.beta, train.input_estimator, train.weight_estimator)
    if train.dtype is not None and train.dtype not in REAL:
        fail(op, "dtype", "float32, float16, bfloat16 or float64", train.dtype)
    return train


def check(op: str, input, weight, bias, scale, ndim: int, estimators) -> Estimators:
    """Checks what all trained operators take; estimators: their keywords."""
    check_real(op, "input", input)
    check_real(op, "weight", weight, ndim)
    if input.device != weight.device:
        check_same_device(op, input, weight=weight)
    if bias is not None or scale is not None:
        check_same_device(op, input, bias=bias, scale=scale)
        check_channel_vector(op, "bias", bias, weight.shape[0])
        check_channel_vector(op, "scale", scale, weight.shape[0])
    return _estimators(op, **estimators)


class Signs:
    """What one input of a binary operator keeps: its packed signs, and what its estimator needs."""

    @staticmethod
    def pack(x: Tensor, name: str, clip: float | None, dim: int) -> tuple[Tensor, Tensor | None]:
        """(words, saved): saved is packed mask bits, a reference to x, or None."""
        if name == "ste_sign" and clip is not None:
            return inside(x)("sign_pack_mask", x, clip, None, dim % x.dim())
        saved = x if name in ("approx_sign", "swish_sign") else None
        return inside(x)("sign_pack", x, None, dim % x.dim()), saved

    @staticmethod
    def grad(grad: Tensor, saved: Tensor | None, name: str, beta: float, dim: int) -> Tensor:
        if saved is None:
            return grad
        if name == "ste_sign":
            return inside(grad)("mask_grad", grad, saved, dim % grad.dim())
        return estimated_grad(grad, saved, name, beta)


def estimated_grad(grad: Tensor, x: Tensor, estimator: str, beta: float,
                   clip: float | None = 1.0) -> Tensor:
    """grad times the slope of an estimator at x: `estimator_grad` of the contract in one pass, in
    place of the five and more of approx_sign and swish_sign."""
    run, shape = inside(grad), x.shape
    # The operator also sums by channel, whose planes are runs in memory. Short ones cost more than
    # the slopes: for a weight (512, 512, 3, 3) 18.1 ms against 2.4 ms as rows, while two images of
    # (64, 112, 112) take 1.3 ms as they are and 3.4 ms as rows (one thread of an AMD EPYC with
    # avx2, 2026-11-27).
    rows = x.dim() < 2 or (math.prod(shape[2:]) < SHORT_PLANE and not is_channels_last(x))
    if rows:
        columns = max(math.prod(shape[1:] if x.dim() > 1 else shape), 1)
        grad, x = grad.reshape(-1, columns), x.reshape(-1, columns)
    found = run("sign_backward", grad, x, None, None, estimator, clip, beta)[0]
    return found.view(shape) if rows else found


def memory_format(t: Tensor) -> torch.memory_format:
    """Channels-last if `t` is, else contiguous; its gradient gets the same."""
    # PyTorch's batch norm takes ten times as long for mixed formats (docs/notebook/performance.md).
    return torch.channels_last if is_channels_last(t) else torch.contiguous_format


def finish_weight_grad(grad: Tensor, weight: Tensor, words: Tensor, scale: Tensor | None,
                       train: Estimators, wants_weight: bool, wants_scale: bool):
    """(dweight, dscale) from the gradient with respect to the unscaled signs of the weight.

    words: the weight's packed signs.
    """
    if weight.is_cuda and torch.float64 not in (grad.dtype, weight.dtype):
        return finish_in_one(grad, weight, scale, train, wants_weight, wants_scale)
    grad_weight = grad_scale = None
    rows = (-1, *[1] * (weight.dim() - 1))
    if scale is not None and wants_scale:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        signs = ops.unpack.default(words, weight.shape[1], grad.dtype, 1)
        grad_scale = (grad * signs).flatten(1).sum(1, dtype=wide).to(scale.dtype)
    if wants_weight:
        grad_weight = latent_grad(grad, weight, None if scale is None else scale.view(rows), train)
    return grad_weight, grad_scale


def finish_in_one(grad, weight, scale, train: Estimators, wants_weight: bool,
                  wants_scale: bool) -> tuple[Tensor | None, Tensor | None]:
    """`finish_weight_grad` by one operator: one launch where there were four to nine. On a CPU the
    engine's sign_backward is faster than the operator's reference."""
    estimator = train.weight_estimator if wants_weight else "none"
    wants_scale = wants_scale and scale is not None
    if estimator == "none" and not wants_scale:
        return None, None
    grad_weight, grad_scale = inside(grad)(
        "latent_weight_grad", grad, weight, scale, estimator, train.weight_clip, train.beta,
        train.scale_weight_grad, wants_scale)
    return (None if estimator == "none" else grad_weight,
            grad_scale.to(scale.dtype) if wants_scale else None)


def latent_grad(grad: Tensor, weight: Tensor, factor: Tensor | None,
                train: Estimators) -> Tensor | None:
    """The latent weight's gradient from that of its unscaled signs; None if it does not train.

    factor: the scale, shaped to multiply the weight.
    """
    if train.weight_estimator == "none":
        return None
    if factor is not None and train.scale_weight_grad:
        grad = grad * factor.to(grad.dtype)
    if (grad.dtype == torch.float64) != (weight.dtype == torch.float64):
        grad = grad.to(weight.dtype)
    return estimated_grad(grad, weight, train.weight_estimator, train.beta, train.weight_clip)


def wanted(ctx) -> tuple[bool, bool]:
    """Whether the real backward must compute the input's and the weight's gradients."""
    wants_input = ctx.needs_input_grad[0] and ctx.train.input_estimator != "none"
    trains_weight = ctx.needs_input_grad[1] and ctx.train.weight_estimator != "none"
    return wants_input, trains_weight or ctx.needs_input_grad[3]
