"""binary_conv_transpose2d: transposed convolution of signs, with gradients.

It keeps for its backward what `binary_conv2d` keeps: packed signs, and what the sign's estimator
needs. The real part of the backward is PyTorch's own, on operands expanded from the bits.

Filters of a transposed convolution have the input's channels first, (Cin, Cout / groups, kh, kw).
Words, scale and gradients are by output channel, (Cout, Cin / groups, kh, kw), as in all other
operators: `by_output` turns one into the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitkernels import _onnx
from bitkernels._dispatch import FirstOrder, below_autograd, differentiate, in_memory_format
from bitkernels.ops import _training as training
from bitkernels.ops._checks import check_channel_vector, check_same_device, describe, fail
from bitkernels.ops._conv2d_backward import library_backward
from bitkernels.ops._phases import transposed_geometry
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, images
from bitkernels.ops.geometry import empty_real, wants_channels_last

ops = torch.ops.bitkernels


class TransposedSpec(NamedTuple):
    """The geometry of a transposed convolution, checked where its operator is entered."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    groups: int
    dilation: tuple[int, int]


def check(input, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
          dilation=(1,), *, scale=None, **estimators):
    op = "binary_conv_transpose2d"
    train = training.check(op, input, weight, None, None, 4, estimators)
    if input.dim() not in (3, 4):
        fail(op, "input", "(N, C, H, W) or (C, H, W)", describe(input))
    channels, per_group, *kernel = weight.shape
    if groups < 1 or channels % groups:
        fail(op, "groups", f"a divisor of {channels} input channels", groups)
    if input.shape[-3] != channels:
        fail(op, "input", f"{channels} channels wide for a weight of shape {tuple(weight.shape)}",
             f"{input.shape[-3]} channels in {describe(input)}")
    if min(weight.shape) < 1:
        fail(op, "weight", "of at least one channel and tap", describe(weight))
    check_same_device(op, input, bias=bias, scale=scale)
    check_channel_vector(op, "bias", bias, per_group * groups)
    check_channel_vector(op, "scale", scale, per_group * groups)
    size, stride, padding, output_padding, dilation = transposed_geometry(
        op, "input", input.shape[-2:], kernel, stride, padding, output_padding, dilation)
    conv = TransposedSpec(stride, padding, output_padding, groups, dilation)
    return Call((input, weight, bias, scale, conv, train), dict(size=size))


def fake(input, weight, bias, scale, conv, train, *, size):
    shape = (input.shape[0] if input.dim() == 4 else 1, weight.shape[1] * conv.groups, *size)
    out = empty_real(input, shape, train.dtype or input.dtype, wants_channels_last(input, weight))
    return out if input.dim() == 4 else out.squeeze(0)


def by_output(weight: Tensor, groups: int) -> Tensor:
    """(Cin, Cout / groups, ...) to (Cout, Cin / groups, ...), and back."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def spread(scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A factor of each output channel, (Cout,), shaped to multiply (Cin, Cout / groups, ...)."""
    rows = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
    return rows.view(*rows.shape, *[1] * (weight.dim() - 2))


def pack_filters(weight: Tensor, groups: int) -> Tensor:
    """(Cin, Cout / groups, kh, kw) to words (Cout, kh, kw, ceil(Cin / groups / 32))."""
    return ops.sign_pack.default(weight.unflatten(0, (groups, -1)), None, 1).flatten(0, 1)


class _BinaryConvTranspose2d(FirstOrder):
    operator = "binary_conv_transpose2d"
    onnx = staticmethod(_onnx.binary_conv_transpose2d)

    @staticmethod
    def call(input, weight, bias, scale, conv, train):
        return ops.binary_conv_transpose2d.default(input, weight, bias, *conv, scale=scale,
                                                   **train.keywords())

    @staticmethod
    def below(input, *rest):
        return _on_words(ops.sign_pack.default(input, None, 1), input, *rest)

    @staticmethod
    def forward(ctx, input, weight, bias, scale, conv, train):
        with below_autograd():
            words, saved = training.Signs.pack(input, train.of_input(ctx.needs_input_grad[0]),
                                               train.input_clip, 1)
            out = _on_words(words, input, weight, bias, scale, conv, train)
        ctx.save_for_backward(words, saved, weight, scale)
        ctx.conv, ctx.train, ctx.memory_format = conv, train, training.memory_format(input)
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, tensors, grad):
        words, saved, weight, scale = tensors
        conv, train = ctx.conv, ctx.train
        wants_input, wants_weight = training.wanted(ctx)
        grad_input = grad_weight = grad_scale = grad_bias = None
        if wants_input or wants_weight:
            # In the weight's own memory order. Expanded from words by output channel they made this
            # backward take 238 ms for 116 (512 to 256 channels, 4x4, 14x14 image, one core of a
            # Xeon, 2026-11-27).
            signs = ops.rsign.default(weight, weight.new_zeros(weight.shape[1])).to(grad.dtype)
            scaled = signs
            if scale is not None:
                scaled = signs * spread(scale, weight, conv.groups).to(grad.dtype)
            x = ops.unpack.default(words, weight.shape[0], grad.dtype, 1)
            grad_input, grad_signs = library_backward(
                in_memory_format(grad, torch.channels_last), x, scaled, conv.stride, conv.padding,
                conv.dilation, conv.groups, (wants_input, wants_weight), True, conv.output_padding)
            if wants_input:
                grad_input = in_memory_format(grad_input.to(ctx.input_dtype), ctx.memory_format)
                grad_input = training.Signs.grad(grad_input, saved, train.input_estimator,
                                                 train.beta, 1)
            if wants_weight:
                grad_weight, grad_scale = _finish_weight_grad(
                    grad_signs, weight, signs, scale, conv, train, *ctx.needs_input_grad[1:4:2])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None, None


def _finish_weight_grad(grad, weight, signs, scale, conv, train, wants_weight: bool,
                        wants_scale: bool):
    """(dweight, dscale) from the gradient with respect to the unscaled signs of the weight."""
    grad_weight = grad_scale = None
    if scale is not None and wants_scale:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        per_input = (grad * signs).sum((2, 3), dtype=wide)  # (Cin, Cout / groups)
        grad_scale = per_input.unflatten(0, (conv.groups, -1)).sum(1).flatten().to(scale.dtype)
    if wants_weight:
        factor = None if scale is None else spread(scale, weight, conv.groups)
        grad_weight = training.latent_grad(grad, weight, factor, train)
    return grad_weight, grad_scale


def _on_words(words, input, weight, bias, scale, conv, train) -> Tensor:
    return ops.packed_conv_transpose2d.default(
        words, pack_filters(weight, conv.groups), weight.shape[0], *conv, scale=scale, bias=bias,
        dtype=train.dtype or input.dtype, channels_last=wants_channels_last(input, weight))


def autograd(*args, **kw):
    input, weight, bias, scale, conv, train = check(*args, **kw)[0]
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    out = differentiate(_BinaryConvTranspose2d, (batched, weight, bias, scale), conv, train)
    return out if batched is input else out.squeeze(0)


def samples(v):
    x, weight, bias = v.leaf(2, 6, 5, 6), v.leaf(6, 4, 3, 2), v.leaf(8)
    return [
        Sample((x, weight, bias, (2,), (1,), (1,), 2)),
        Sample((channels_last(x.detach().half()).requires_grad_(), weight, None, (2, 3), (0, 1),
                (1, 0), 2, (1, 2)),
               dict(scale=bias, input_estimator="approx_sign", input_clip=None)),
        Sample((x[0].detach().requires_grad_(), weight.detach()), dict(dtype=torch.bfloat16))]


define(Operator(
    # The arguments in the order of torch.nn.functional.conv_transpose2d.
    schemas=("binary_conv_transpose2d(Tensor input, Tensor weight, Tensor? bias=None, "
             "int[2] stride=1, int[2] padding=0, int[2] output_padding=0, int groups=1, "
             f"int[2] dilation=1, *, {training.SCHEMA}) -> Tensor",),
    group="Training", check=check, fake=fake, autograd=autograd, samples=samples,
    batched=images("input", unbatched=True), engine=False,
    text=f"""
Transposed convolution of sign(input) with sign(weight), with gradients by estimators; as
binary_conv2d. Geometric arguments are those of torch.nn.functional.conv_transpose2d, in its order.

Pixels of the output that no tap reaches are the bias.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, Cin, H, W) or (Cin, H, W).
  weight: real (Cin, Cout / groups, kh, kw), the latent weights.
  bias: (Cout,) real; None: none.
  stride: one or two integers, at least 1.
  padding: one or two integers, at least 0: rows and columns taken away at each side.
  output_padding: one or two integers, smaller than stride or dilation: rows and columns more.
  groups: a divisor of both numbers of channels.
  dilation: one or two integers, at least 1.
{training.TEXT}Returns:
  real (N, Cout, OH, OW) or (Cout, OH, OW), with
  OH = (H - 1) stride - 2 padding + dilation (kh - 1) + output_padding + 1.
Errors:
  an input with another number of channels than the weight takes, integers, other shapes, an output
  without pixels, unknown estimators, a clip below 0, devices that differ.
Example:
  >>> x = torch.randn(1, 16, 4, 4, requires_grad=True)
  >>> weight = torch.randn(16, 8, 2, 2, requires_grad=True)
  >>> y = ops.binary_conv_transpose2d(x, weight, stride=2)
  >>> sign = lambda t: torch.where(t < 0, -1.0, 1.0)
  >>> torch.equal(y, F.conv_transpose2d(sign(x), sign(weight), stride=2))
  True
"""))
