"""The differentiable operators: forward on bits, backward by straight-through estimators.

`binary_conv2d`, `binary_linear` and `rsign` run the packed operators forward. For the backward they
keep packed bits (the signs of the input and the mask |x| <= clip: 2 bits an element), never a real
copy; only estimators that need |x| itself (approx_sign, swish_sign) keep a reference to the input.
The real part of the backward reads those bits by tables on CPUs where that is faster, else it is
`aten.convolution_backward` on operands expanded from them.

Estimators of d sign(x) / dx (Larq's names, plus the two trivial ones):
  ste_sign     1 where |x| <= clip (clip None: everywhere)
  approx_sign  2 - 2|x| where |x| <= 1 (Bi-Real Net)
  swish_sign   beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)) (BNN+)
  identity     1
  none         no gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import _onnx, reference
from bitkernels._checks import (
    check_binary_conv2d,
    check_binary_linear,
    check_clip,
    check_estimator,
    check_rsign,
    is_channels_last,
    wants_channels_last,
)
from bitkernels._conv2d_backward import conv2d_backward, scaled_signs
from bitkernels._dispatch import (
    FirstOrder,
    autocast,
    below_autograd,
    in_memory_format,
    is_recorded,
    is_traced,
    record,
    refuse_grad,
    unrecorded,
)
from bitkernels._estimators import estimated_grad
from bitkernels._ops import LIB

ops = torch.ops.bitkernels
_forward = ops.binary_conv2d_forward.default


class _Signs:
    """What one input of a binary operator keeps: its packed signs, and what its estimator needs."""

    @staticmethod
    def pack(x: Tensor, name: str, clip: float | None, dim: int) -> tuple[Tensor, Tensor | None]:
        """(words, saved): saved is packed mask bits, a reference to x, or None."""
        if name == "ste_sign" and clip is not None:
            return ops.sign_pack_mask.default(x, clip, None, dim)
        saved = x if name in ("approx_sign", "swish_sign") else None
        return ops.sign_pack.default(x, None, dim), saved

    @staticmethod
    def grad(grad: Tensor, saved: Tensor | None, name: str, clip, beta: float, dim: int) -> Tensor:
        if saved is None:
            return grad
        if name == "ste_sign":
            return ops.mask_grad.default(grad, saved, dim)
        return estimated_grad(grad, saved, name, beta)


def memory_format(t: Tensor) -> torch.memory_format:
    """Channels-last if `t` is, else contiguous; its gradient gets the same."""
    # PyTorch's batch norm takes ten times as long for mixed formats (docs/notebook/performance.md).
    return torch.channels_last if is_channels_last(t) else torch.contiguous_format


def finish_weight_grad(grad: Tensor, weight: Tensor, words: Tensor, scale: Tensor | None, conf,
                       wants_weight: bool, wants_scale: bool):
    """(dweight, dscale) from the gradient with respect to the unscaled signs of the weight.

    words: the weight's packed signs.
    """
    grad_weight = grad_scale = None
    rows = (-1, *[1] * (weight.dim() - 1))
    if scale is not None and wants_scale:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        signs = ops.unpack.default(words, weight.shape[1], grad.dtype, 1)
        grad_scale = (grad * signs).flatten(1).sum(1, dtype=wide).to(scale.dtype)
    if wants_weight:
        grad_weight = latent_grad(grad, weight, None if scale is None else scale.view(rows), conf)
    return grad_weight, grad_scale


def latent_grad(grad: Tensor, weight: Tensor, factor: Tensor | None, conf) -> Tensor | None:
    """The latent weight's gradient from that of its unscaled signs; None if it does not train.

    factor: the scale, shaped to multiply the weight.
    """
    if conf["weight_estimator"] == "none":
        return None
    if factor is not None and conf["scale_weight_grad"]:
        grad = grad * factor.to(grad.dtype)
    if (grad.dtype == torch.float64) != (weight.dtype == torch.float64):
        grad = grad.to(weight.dtype)
    return ops.sign_backward.default(
        grad, weight, None, None, estimator=conf["weight_estimator"], clip=conf["weight_clip"],
        beta=conf["beta"])[0]


def _wanted(ctx) -> tuple[bool, bool]:
    """Whether the real backward must compute the input's and the weight's gradients."""
    wants_input = ctx.needs_input_grad[0] and ctx.conf["input_estimator"] != "none"
    trains_weight = ctx.needs_input_grad[1] and ctx.conf["weight_estimator"] != "none"
    return wants_input, trains_weight or ctx.needs_input_grad[3]


def _as_matrix(t: Tensor) -> Tensor:
    return torch.atleast_2d(t).flatten(0, -2)


class _BinaryConv2d(FirstOrder):
    operator = "binary_conv2d"
    onnx = staticmethod(_onnx.binary_conv2d)

    @staticmethod
    def call(input, weight, bias, scale, conf):
        options = dict(conf)
        geometry = [options.pop(name) for name in ("stride", "pad", "dilation", "groups")]
        return ops.binary_conv2d.default(input, weight, bias, *geometry, scale=scale, **options)

    @staticmethod
    def forward(ctx, input, weight, bias, scale, conf):
        estimator = conf["input_estimator"] if ctx.needs_input_grad[0] else "none"
        clip = conf["input_clip"] if estimator == "ste_sign" else None
        with below_autograd():
            out, words, mask = _conv2d_forward(input, weight, bias, scale, conf, clip)
        saved = None if clip is None else mask
        if estimator == "approx_sign" or estimator == "swish_sign":
            saved = input
        ctx.save_for_backward(words, saved, weight, scale)
        ctx.conf, ctx.memory_format = conf, memory_format(input)
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        words, saved, weight, scale = ctx.saved_tensors
        conf = ctx.conf
        wants_input, wants_weight = _wanted(ctx)
        grad_input = grad_weight = grad_scale = grad_bias = None
        if wants_input or wants_weight:
            weight_words = ops.sign_pack.default(weight, None, 1)
            grad_input, grad_signs = conv2d_backward(grad, words, weight, weight_words, scale, conf,
                                                     wants_input, wants_weight)
            if wants_input:
                grad_input = in_memory_format(grad_input.to(ctx.input_dtype), ctx.memory_format)
                grad_input = _Signs.grad(grad_input, saved, conf["input_estimator"],
                                         conf["input_clip"], conf["beta"], 1)
            if wants_weight:
                grad_weight, grad_scale = finish_weight_grad(
                    grad_signs, weight, weight_words, scale, conf, ctx.needs_input_grad[1],
                    ctx.needs_input_grad[3])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None


def _conv2d_forward(input, weight, bias, scale, conf, clip):
    return _forward(
        input, weight, bias, scale, conf["stride"], conf["pad"], conf["dilation"], conf["groups"],
        conf["pad_value"], clip,
        conf["dtype"] or input.dtype, wants_channels_last(input, weight))


def _binary_conv2d(input, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1, *,
                   pad_value=0, scale=None, input_estimator="ste_sign", input_clip=1.0,
                   weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True,
                   dtype=None):
    _, stride, pad, dilation = check_binary_conv2d(
        input, weight, bias, stride, padding, dilation, groups, pad_value=pad_value, scale=scale,
        input_estimator=input_estimator, input_clip=input_clip, weight_estimator=weight_estimator,
        weight_clip=weight_clip, dtype=dtype)
    conf = dict(stride=stride, pad=pad, dilation=dilation, groups=groups, pad_value=pad_value,
                input_estimator=input_estimator, input_clip=input_clip,
                weight_estimator=weight_estimator, weight_clip=weight_clip, beta=beta,
                scale_weight_grad=scale_weight_grad, dtype=dtype)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    if is_recorded("binary_conv2d", input, weight, bias, scale):
        out = record(_BinaryConv2d, (batched, weight, bias, scale), conf)
    elif is_traced():
        out = unrecorded(_BinaryConv2d, (batched, weight, bias, scale), conf)
    else:
        with below_autograd():
            out = _conv2d_forward(batched, weight, bias, scale, conf, None)[0]
    return out if input.dim() == 4 else out.squeeze(0)


def _binary_conv2d_padding(input, weight, bias=None, stride=(1,), padding="valid", *args, **kw):
    return _binary_conv2d(input, weight, bias, stride, padding, *args, **kw)


class _BinaryLinear(FirstOrder):
    operator = "binary_linear"
    onnx = staticmethod(_onnx.binary_linear)

    @staticmethod
    def call(input, weight, bias, scale, conf):
        return ops.binary_linear.default(input, weight, bias, scale=scale, **conf)

    @staticmethod
    def forward(ctx, input, weight, bias, scale, conf):
        with below_autograd():
            estimator = conf["input_estimator"] if ctx.needs_input_grad[0] else "none"
            words, saved = _Signs.pack(input, estimator, conf["input_clip"], -1)
            out = _linear_on_words(words, input, weight, bias, scale, conf)
        ctx.save_for_backward(words, saved, weight, scale)
        ctx.conf = conf
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        words, saved, weight, scale = ctx.saved_tensors
        conf = ctx.conf
        wants_input, wants_weight = _wanted(ctx)
        grad_input = grad_weight = grad_scale = grad_bias = None
        weight_words = ops.sign_pack.default(weight, None, 1)
        if wants_input:
            scaled = scaled_signs(weight, weight_words, scale, grad.dtype)
            grad_input = _Signs.grad((grad @ scaled).to(ctx.input_dtype), saved,
                                     conf["input_estimator"], conf["input_clip"], conf["beta"], -1)
        if wants_weight:
            x = ops.unpack.default(words, weight.shape[1], grad.dtype, -1)
            grad_signs = _as_matrix(grad).T @ _as_matrix(x)
            grad_weight, grad_scale = finish_weight_grad(
                grad_signs, weight, weight_words, scale, conf, ctx.needs_input_grad[1],
                ctx.needs_input_grad[3])
        if ctx.needs_input_grad[2]:
            grad_bias = _as_matrix(grad).sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None


def _linear_on_words(words, input, weight, bias, scale, conf):
    return ops.packed_linear.default(
        words, ops.sign_pack.default(weight), weight.shape[1], scale=scale, bias=bias,
        dtype=conf["dtype"] or input.dtype)


def _binary_linear(input, weight, bias=None, *, scale=None, input_estimator="ste_sign",
                   input_clip=1.0, weight_estimator="ste_sign", weight_clip=1.0, beta=5.0,
                   scale_weight_grad=True, dtype=None):
    check_binary_linear(
        input, weight, bias, scale=scale, input_estimator=input_estimator, input_clip=input_clip,
        weight_estimator=weight_estimator, weight_clip=weight_clip, dtype=dtype)
    conf = dict(input_estimator=input_estimator, input_clip=input_clip,
                weight_estimator=weight_estimator, weight_clip=weight_clip, beta=beta,
                scale_weight_grad=scale_weight_grad, dtype=dtype)
    if is_recorded("binary_linear", input, weight, bias, scale):
        return record(_BinaryLinear, (input, weight, bias, scale), conf)
    if is_traced():
        return unrecorded(_BinaryLinear, (input, weight, bias, scale), conf)
    with below_autograd():
        words = ops.sign_pack.default(input)
        return _linear_on_words(words, input, weight, bias, scale, conf)


class _RSign(FirstOrder):
    operator = "rsign"

    @staticmethod
    def onnx(input, shift, *_):
        return reference.rsign(input, shift)

    @staticmethod
    def call(input, shift, estimator, clip, beta):
        return ops.rsign.default(input, shift, estimator=estimator, clip=clip, beta=beta)

    @staticmethod
    def forward(ctx, input, shift, estimator, clip, beta):
        saved = input if estimator in ("approx_sign", "swish_sign") else None
        with below_autograd():
            if estimator == "ste_sign" and clip is not None:
                saved = ops.sign_pack_mask.default(input, clip, shift, 1)[1]
            out = ops.rsign.default(input, shift)
        ctx.save_for_backward(saved, shift)
        ctx.conf, ctx.memory_format = (estimator, clip, beta), memory_format(input)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, shift = ctx.saved_tensors
        estimator, clip, beta = ctx.conf
        if estimator == "none":
            return None, None, None, None, None
        if saved is not None and estimator != "ste_sign":
            per_sample = shift.dim() > 1
            if per_sample:  # as the N C channels of one sample, which sign_backward takes
                grad, saved = (t.flatten(0, 1).unsqueeze(0) for t in (grad, saved))
            grad_input, grad_shift = ops.sign_backward.default(
                grad, saved, shift.flatten(), None, estimator=estimator, clip=clip, beta=beta)
            if per_sample:
                grad_input = in_memory_format(
                    grad_input.squeeze(0).unflatten(0, shift.shape[:2]), ctx.memory_format)
            return grad_input, grad_shift.to(shift.dtype).view(shift.shape), None, None, None
        grad = in_memory_format(grad, ctx.memory_format)
        grad_input = _Signs.grad(grad, saved, estimator, clip, beta, 1)
        grad_shift = None
        if ctx.needs_input_grad[1]:
            first = 0 if shift.dim() == 1 else 2  # per sample: over all but N and C
            reduce = [d for d in range(first, grad.dim()) if d != 1]
            grad_shift = grad_input.to(shift.dtype) if not reduce else grad_input.sum(
                reduce, dtype=shift.dtype)
            grad_shift = grad_shift.view(shift.shape)
        return grad_input, grad_shift, None, None, None


def _rsign(input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    check_rsign(input, shift)
    check_estimator("rsign", "estimator", estimator)
    check_clip("rsign", "clip", clip)
    if is_recorded("rsign", input, shift):
        return record(_RSign, (input, shift), estimator, clip, beta)
    if is_traced():  # which must not forget the estimator
        return unrecorded(_RSign, (input, shift), estimator, clip, beta)
    with below_autograd():
        return ops.rsign.default(input, shift)


class _RPReLU(FirstOrder):
    operator = "rprelu"
    call = ops.rprelu.default
    onnx = staticmethod(reference.rprelu)

    @staticmethod
    def forward(ctx, input, shift_in, slope, shift_out):
        ctx.save_for_backward(input, shift_in, slope)
        ctx.shift_out_dtype = shift_out.dtype
        with below_autograd():
            return ops.rprelu.default(input, shift_in, slope, shift_out)

    @staticmethod
    def backward(ctx, grad):
        input, shift_in, slope = ctx.saved_tensors
        grads = ops.rprelu_backward.default(grad, input, shift_in, slope)
        return (grads[0], grads[1].to(shift_in.dtype), grads[2].to(slope.dtype),
                grads[3].to(ctx.shift_out_dtype))


def _rprelu(input, shift_in, slope, shift_out):
    if is_recorded("rprelu", input, shift_in, slope, shift_out):
        return record(_RPReLU, (input, shift_in, slope, shift_out))
    if is_traced():
        return unrecorded(_RPReLU, (input, shift_in, slope, shift_out))
    with below_autograd():
        return ops.rprelu.default(input, shift_in, slope, shift_out)


# Without an Autograd key of their own these would detach silently; they refuse instead.
RAW = ("sign_pack", "sign_pack_mask", "mask_grad", "packed_conv2d", "packed_conv2d.packed",
       "packed_conv2d.both", "packed_conv_transpose2d", "packed_linear", "packed_linear.packed",
       "packed_linear.both", "binary_conv2d_forward", "rprelu_backward", "packed_conv2d_moments",
       "packed_conv2d_input_grad", "packed_conv2d_weight_grad",
       "residual_block_forward", "residual_block_backward", "residual_block_norm_backward",
       "sign_backward")


for _name, _fn in (("binary_conv2d", _binary_conv2d),
                   ("binary_conv2d.padding", _binary_conv2d_padding),
                   ("binary_linear", _binary_linear)):
    LIB.impl(_name, _fn, "Autograd")
    # Below autograd (inference mode) the same function finds no gradient to record.
    LIB.impl(_name, _fn, "CompositeExplicitAutograd")
LIB.impl("rsign", _rsign, "Autograd")
LIB.impl("rprelu", _rprelu, "Autograd")
for _name in RAW:
    _packet, _, _overload = _name.partition(".")
    LIB.impl(_name, refuse_grad(getattr(getattr(ops, _packet), _overload or "default")), "Autograd")
for _name in ("binary_conv2d.default", "binary_conv2d.padding", "binary_linear.default"):
    _packet, _overload = _name.split(".")
    _op = getattr(getattr(ops, _packet), _overload)
    for _device in ("cpu", "cuda"):
        LIB.impl(_name.removesuffix(".default"), autocast(_op, _device),
                 f"Autocast{_device.upper()}")
