"""binary_conv2d: convolution of signs with gradients; and binary_conv2d_forward, which it runs."""

from __future__ import annotations

import functools

import torch

from bitkernels import _onnx
from bitkernels._dispatch import FirstOrder, below_autograd, differentiate, in_memory_format
from bitkernels.ops import _training as training
from bitkernels.ops._checks import check_real, describe, fail
from bitkernels.ops._conv2d_backward import conv2d_backward
from bitkernels.ops._record import (
    Call,
    Operator,
    Sample,
    channels_last,
    define,
    dispatched,
    images,
    inside,
    remembered,
)
from bitkernels.ops.geometry import (
    ConvSpec,
    check_padded,
    conv_output_size,
    empty_real,
    empty_words,
    padding4,
    pair,
    same_padding,
    wants_channels_last,
)

ops = torch.ops.bitkernels


def check_conv(op, input, weight, bias, scale, stride, padding, dilation, groups, pad_value,
               estimators):
    """Checked (`ConvSpec`, `Estimators`)."""
    train = training.check(op, input, weight, bias, scale, 4, estimators)
    geometry = (tuple(stride), padding if isinstance(padding, str) else tuple(padding),
                tuple(dilation), groups, pad_value)
    symbolic = input._has_symbolic_sizes_strides or weight._has_symbolic_sizes_strides
    spec = _spec if symbolic else _remembered_spec  # symbols have no hash
    try:
        return spec(op, input.shape, weight.shape, *geometry), train
    except _Unfit as error:
        fail(op, "input", error.takes, error.got + describe(input))


class _Unfit(Exception):
    """Of an input, whose description goes beyond what is remembered."""

    def __init__(self, takes: str, got: str = "") -> None:
        self.takes, self.got = takes, got


def _spec(op, shape, weight_shape, stride, padding, dilation, groups, pad_value) -> ConvSpec:
    if len(shape) not in (3, 4):
        raise _Unfit("(N, C, H, W) or (C, H, W)")
    channels, (cout, per_group, *kernel) = shape[-3], weight_shape
    if groups < 1 or cout % groups:
        fail(op, "groups", f"a divisor of {cout} output channels", groups)
    if per_group * groups != channels:
        raise _Unfit(f"{per_group * groups} channels wide for a weight of shape "
                     f"{tuple(weight_shape)}" + (f" in {groups} groups" if groups > 1 else ""),
                     f"{channels} channels in ")
    if channels < 1:
        raise _Unfit("at least 1 channel wide")
    if min(kernel) < 1:
        fail(op, "weight", "a filter of at least 1x1", f"shape {tuple(weight_shape)}")
    if pad_value not in (-1, 0, 1):
        fail(op, "pad_value", "-1, 0 or 1", pad_value)
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        pad = same_padding(op, padding, kernel, stride, dilation)
    else:
        pad = padding4(op, padding)
    oh, ow = conv_output_size(op, shape[-2:], kernel, stride, pad, dilation)
    check_padded(op, pad, oh, ow)
    return ConvSpec(stride, pad, dilation, groups, pad_value)


# Every call of a layer on images of one size gives the same.
_remembered_spec = functools.lru_cache(1024)(_spec)


def _checked(input, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1, *,
             pad_value=0, scale=None, **estimators):
    conv, train = check_conv("binary_conv2d", input, weight, bias, scale, stride, padding,
                             dilation, groups, pad_value, estimators)
    return input, weight, bias, scale, conv, train


def check(*args, **kw):
    return Call(_checked(*args, **kw))


def fake(input, weight, bias, scale, conv, train):
    size = conv.output_size(input.shape[-2:], weight.shape[2:])
    shape = (input.shape[0] if input.dim() == 4 else 1, weight.shape[0], *size)
    out = empty_real(input, shape, train.dtype or input.dtype, wants_channels_last(input, weight))
    return out if input.dim() == 4 else out.squeeze(0)


class _BinaryConv2d(FirstOrder):
    operator = "binary_conv2d"
    onnx = staticmethod(_onnx.binary_conv2d)

    @staticmethod
    def call(input, weight, bias, scale, conv, train):
        return ops.binary_conv2d.default(
            input, weight, bias, conv.stride, conv.pad, conv.dilation, conv.groups,
            pad_value=conv.pad_value, scale=scale, **train.keywords())

    @staticmethod
    def below(input, weight, bias, scale, conv, train):
        return _forward(input, weight, bias, scale, conv, train, None)[0]

    @staticmethod
    def forward(ctx, input, weight, bias, scale, conv, train):
        estimator = train.of_input(ctx.needs_input_grad[0])
        clip = train.input_clip if estimator == "ste_sign" else None
        with below_autograd():
            out, words, mask = _forward(input, weight, bias, scale, conv, train, clip)
        saved = None if clip is None else mask
        if estimator == "approx_sign" or estimator == "swish_sign":
            saved = input
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
            weight_words = inside(weight)("sign_pack", weight, None, 1)
            grad_input, grad_signs = conv2d_backward(grad, words, weight, weight_words, scale, conv,
                                                     wants_input, wants_weight)
            if wants_input:
                grad_input = in_memory_format(grad_input.to(ctx.input_dtype), ctx.memory_format)
                grad_input = training.Signs.grad(grad_input, saved, train.input_estimator,
                                                 train.beta, 1)
            if wants_weight:
                grad_weight, grad_scale = training.finish_weight_grad(
                    grad_signs, weight, weight_words, scale, train, ctx.needs_input_grad[1],
                    ctx.needs_input_grad[3])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None, None


def _forward(input, weight, bias, scale, conv, train, clip):
    if inside(input) is not dispatched:
        return composed_forward(input, weight, bias, scale, conv, clip, train.dtype or input.dtype,
                                wants_channels_last(input, weight))
    return ops.binary_conv2d_forward.default(
        input, weight, bias, scale, conv.stride, conv.pad, conv.dilation, conv.groups,
        conv.pad_value, clip, train.dtype or input.dtype, wants_channels_last(input, weight))


def autograd(*args, **kw):
    input, weight, bias, scale, conv, train = _checked(*args, **kw)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    out = differentiate(_BinaryConv2d, (batched, weight, bias, scale), conv, train)
    return out if batched is input else out.squeeze(0)


def samples(v):
    geometry = (2, 1), (1, 0, 2, 1), (1, 1), 1
    x, w, bias = v.leaf(2, 37, 5, 6), v.leaf(19, 37, 3, 3), v.leaf(19)
    gx, gw = v.leaf(2, 6, 5, 6), v.leaf(4, 3, 3, 3)
    return [
        Sample((x, w, bias, *geometry)),
        Sample((channels_last(x), w, bias), dict(scale=v.leaf(19), scale_weight_grad=False)),
        Sample((gx, gw, None, (1, 1), (1, 1), (1, 1), 2),
               dict(pad_value=-1, input_estimator="approx_sign")),
        Sample((x[0].detach().requires_grad_(), w, bias)),
        Sample((x.detach(), w.detach()), dict(dtype=torch.bfloat16)),
        Sample((x, w, bias, (1,), "same"), {}, "padding"),
        Sample((x, w, bias, (2,), "valid"), dict(weight_estimator="swish_sign"), "padding")]


def check_forward(input, weight, bias, scale, stride, padding, dilation, groups, pad_value, clip,
                  dtype, channels_last):
    """Errors are binary_conv2d's."""
    check_real("binary_conv2d", "input", input, 4)
    conv, _ = check_conv("binary_conv2d", input, weight, bias, scale, stride, padding, dilation,
                         groups, pad_value, dict(input_clip=clip, dtype=dtype))
    return Call((input, weight, bias, scale, conv, clip, dtype, channels_last))


def fake_forward(input, weight, bias, scale, conv, clip, dtype, channels_last):
    size = conv.output_size(input.shape[-2:], weight.shape[2:])
    words = empty_words(input, (input.shape[0], *input.shape[2:]), input.shape[1])
    mask = input.new_empty(0, dtype=torch.int32) if clip is None else torch.empty_like(words)
    shape = (input.shape[0], weight.shape[0], *size)
    return empty_real(input, shape, dtype, channels_last), words, mask


def composed_forward(input, weight, bias, scale, conv, clip, dtype, channels_last):
    """By the packed operators, whatever backend they have on the device."""
    return remembered(inside(input), _passes, input, weight, bias, scale, conv, clip, dtype,
                      channels_last)


def _passes(run, input, weight, bias, scale, conv, clip, dtype, channels_last):
    if clip is None:
        words, mask = run("sign_pack", input, None, 1), input.new_empty(0, dtype=torch.int32)
    else:
        words, mask = run("sign_pack_mask", input, clip, None, 1)
    out, _ = run(
        "packed_conv2d", words, run("sign_pack", weight, None, 1), input.shape[1], conv.stride,
        conv.pad, conv.dilation, conv.groups, pad_value=conv.pad_value, out_channels=None,
        scale=scale, bias=bias, dtype=dtype, channels_last=channels_last, real=True, packed=False)
    return out, words, mask


def samples_forward(v):
    x, w, c = v.real(2, 37, 5, 6), v.real(19, 37, 3, 3), v.real(19)
    return [Sample((x, w, None, c, (1, 1), (1, 1, 2, 0), (1, 1), 1, 0, 1.0, torch.float32, True)),
            Sample((x, w, c, None, (2, 1), (0, 0), (1, 1), 1, 1, None, torch.bfloat16, False))]


_ARGUMENTS = "Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1"
_REST = f"int[2] dilation=1, int groups=1, *, int pad_value=0, {training.SCHEMA}) -> Tensor"

define(Operator(
    schemas=(
        "binary_conv2d_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, "
        "int[] stride, int[] padding, int[] dilation, int groups, int pad_value, float? clip, "
        "ScalarType dtype, bool channels_last) -> (Tensor, Tensor, Tensor)",),
    group="Training", check=check_forward, fake=fake_forward, composed=composed_forward,
    samples=samples_forward, batched=images("input"),
    text="""
What binary_conv2d runs: its output, and the packed signs and mask that its backward keeps.

Arguments:
  input: real (N, Cin, H, W).
  weight: real (Cout, Cin / groups, kh, kw).
  bias: (Cout,) real or None.
  scale: (Cout,) real or None.
  stride: two integers.
  padding: one, two or four integers.
  dilation: two integers.
  groups: a divisor of both numbers of channels.
  pad_value: -1, 0 or 1.
  clip: of the mask |input| <= clip; None: no mask, which is then empty.
  dtype: of the output.
  channels_last: the memory format of the output.
Returns:
  (output (N, Cout, OH, OW), signs int32 (N, H, W, words), mask int32, like signs or empty).
Errors:
  those of binary_conv2d; tensors that require a gradient.
Example:
  >>> x, weight = torch.randn(1, 16, 8, 8), torch.randn(8, 16, 3, 3)
  >>> y, signs, mask = ops.binary_conv2d_forward(
  ...     x, weight, None, None, (1, 1), (1, 1), (1, 1), 1, 0, 1.0, torch.float32, False)
  >>> y.shape, signs.shape, mask.shape
  (torch.Size([1, 8, 8, 8]), torch.Size([1, 8, 8, 1]), torch.Size([1, 8, 8, 1]))
"""))
define(Operator(
    schemas=(f"binary_conv2d({_ARGUMENTS}, int[2] padding=0, {_REST}",
             f"binary_conv2d.padding({_ARGUMENTS}, str padding='valid', {_REST}"),
    group="Training", check=check, fake=fake, autograd=autograd, samples=samples,
    batched=images("input", unbatched=True), engine=False,
    text=f"""
Convolution of sign(input) with sign(weight), with gradients by estimators. The overload .padding
takes "same" and "valid".

Forward: both are packed, convolved in integers and multiplied by scale, plus bias, in float32.
Backward: 2 bits are kept for each input value; approx_sign and swish_sign keep the input.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, Cin, H, W) or (Cin, H, W).
  weight: real (Cout, Cin / groups, kh, kw), the latent weights.
  bias: (Cout,) real; None: none.
  stride: one or two integers, at least 1.
  padding: one, two or four integers, as of packed_conv2d; .padding: "same" or "valid".
  dilation: one or two integers, at least 1.
  groups: a divisor of both numbers of channels.
  pad_value: 0, or the sign -1 or 1 that the padding is.
{training.TEXT}Returns:
  real (N, Cout, OH, OW) or (Cout, OH, OW).
Errors:
  an input with another number of channels than the weight takes, integers, other shapes, unknown
  estimators, a clip below 0, devices that differ.
Example:
  >>> x = torch.randn(1, 16, 8, 8, requires_grad=True)
  >>> weight = torch.randn(8, 16, 3, 3, requires_grad=True)
  >>> y = ops.binary_conv2d(x, weight, padding=1)
  >>> y.sum().backward()
  >>> y.shape, x.grad.shape, weight.grad.shape
  (torch.Size([1, 8, 8, 8]), torch.Size([1, 16, 8, 8]), torch.Size([8, 16, 3, 3]))
"""))
