"""binary_linear: a linear layer of signs, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import _onnx
from bitkernels._dispatch import FirstOrder, below_autograd, differentiate
from bitkernels.ops import _training as training
from bitkernels.ops._checks import describe, fail
from bitkernels.ops._conv2d_backward import scaled_signs
from bitkernels.ops._record import Call, Operator, Sample, define, inside, rows
from bitkernels.ops.geometry import empty_real

ops = torch.ops.bitkernels


def check(input, weight, bias=None, *, scale=None, **estimators):
    op = "binary_linear"
    train = training.check(op, input, weight, bias, scale, 2, estimators)
    if weight.shape[1] < 1:
        fail(op, "weight", "of at least 1 input channel", describe(weight))
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        fail(op, "input", f"(..., {weight.shape[1]}) for a weight of shape "
             f"{tuple(weight.shape)}", describe(input))
    return Call((input, weight, bias, scale, train))


def fake(input, weight, bias, scale, train):
    return empty_real(input, (*input.shape[:-1], weight.shape[0]), train.dtype or input.dtype,
                      False)


class _BinaryLinear(FirstOrder):
    operator = "binary_linear"
    onnx = staticmethod(_onnx.binary_linear)

    @staticmethod
    def call(input, weight, bias, scale, train):
        return ops.binary_linear.default(input, weight, bias, scale=scale, **train.keywords())

    @staticmethod
    def below(input, *rest):
        return _on_words(ops.sign_pack.default(input), input, *rest)

    @staticmethod
    def forward(ctx, input, weight, bias, scale, train):
        with below_autograd():
            words, saved = training.Signs.pack(input, train.of_input(ctx.needs_input_grad[0]),
                                               train.input_clip, -1)
            out = _on_words(words, input, weight, bias, scale, train)
        ctx.save_for_backward(words, saved, weight, scale)
        ctx.train = train
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, tensors, grad):
        words, saved, weight, scale = tensors
        train = ctx.train
        wants_input, wants_weight = training.wanted(ctx)
        grad_input = grad_weight = grad_scale = grad_bias = None
        weight_words = inside(weight)("sign_pack", weight, None, 1)
        if wants_input:
            scaled = scaled_signs(weight, weight_words, scale, grad.dtype)
            grad_input = training.Signs.grad((grad @ scaled).to(ctx.input_dtype), saved,
                                             train.input_estimator, train.beta, -1)
        if wants_weight:
            x = inside(words)("unpack", words, weight.shape[1], grad.dtype, words.dim() - 1)
            grad_signs = _as_matrix(grad).T @ _as_matrix(x)
            grad_weight, grad_scale = training.finish_weight_grad(
                grad_signs, weight, weight_words, scale, train, ctx.needs_input_grad[1],
                ctx.needs_input_grad[3])
        if ctx.needs_input_grad[2]:
            grad_bias = _as_matrix(grad).sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None


def _as_matrix(t: Tensor) -> Tensor:
    return torch.atleast_2d(t).flatten(0, -2)


def _on_words(words, input, weight, bias, scale, train):
    run = inside(input)
    return run("packed_linear", words, run("sign_pack", weight, None, 1), weight.shape[1],
               scale=scale, bias=bias, dtype=train.dtype or input.dtype, out_channels=None,
               real=True, packed=False)[0]


def autograd(*args, **kw):
    *tensors, train = check(*args, **kw).args
    return differentiate(_BinaryLinear, tuple(tensors), train)


def samples(v):
    pair = v.leaf(2, 3, 37), v.leaf(19, 37)
    return [Sample((*pair, v.leaf(19))),
            Sample(pair, dict(scale=v.leaf(19), input_estimator="swish_sign"))]


define(Operator(
    schemas=("binary_linear(Tensor input, Tensor weight, Tensor? bias=None, *, "
             f"{training.SCHEMA}) -> Tensor",),
    group="Training", check=check, fake=fake, autograd=autograd, samples=samples,
    batched=rows("input"), engine=False,
    text=f"""
sign(input) times the transpose of sign(weight), with gradients by estimators; as binary_conv2d.

Arguments:
  input: float32, float16, bfloat16 or float64, (..., in).
  weight: real (out, in), the latent weights.
  bias: (out,) real; None: none.
{training.TEXT}Returns:
  real (..., out).
Errors:
  an input of another width than the weight, integers, unknown estimators, a clip below 0, devices
  that differ.
Example:
  >>> x = torch.randn(4, 100, requires_grad=True)
  >>> ops.binary_linear(x, torch.randn(10, 100)).sum().backward()
  >>> bool((x.grad[x.abs() > 1] == 0).all())
  True
"""))
