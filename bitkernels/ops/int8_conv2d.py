"""int8_conv2d: convolution of real images, rounded to int8, with int8 filters."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bitkernels.ops import _int8
from bitkernels.ops._checks import describe, fail
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, images
from bitkernels.ops.geometry import (
    check_groups,
    check_padded,
    conv_output_size,
    empty_real,
    padding4,
    pair,
)

_OP = "int8_conv2d"


def geometry(input, weight, stride, padding, dilation, groups):
    """Checked (N, Cout, OH, OW), stride, (top, bottom, left, right), dilation."""
    _int8.check_operands(_OP, input, weight, ("(N, Cin, H, W)", "(Cout, Cin / groups, kh, kw)"), 4)
    channels, kernel = input.shape[1], weight.shape[2:]
    check_groups(_OP, channels, weight.shape[0], groups)
    if weight.shape[1] * groups != channels:
        fail(_OP, "weight", f"{channels // groups} channels wide for {channels} channels in groups "
             f"of {groups}", describe(weight))
    stride, dilation = pair(_OP, "stride", stride, 1), pair(_OP, "dilation", dilation, 1)
    pad = padding4(_OP, padding)
    if kernel[0] < 1 or kernel[1] < 1:
        fail(_OP, "weight", "a filter of at least 1x1", describe(weight))
    oh, ow = conv_output_size(_OP, input.shape[2:], kernel, stride, pad, dilation)
    check_padded(_OP, pad, oh, ow)
    return (input.shape[0], weight.shape[0], oh, ow), stride, pad, dilation


def check(input, weight, scale, bias, steps, stride=(1,), padding=(0,), dilation=(1,), groups=1):
    geometry(input, weight, stride, padding, dilation, groups)
    _int8.check_rest(_OP, input, weight, scale, bias, steps)
    return Call((input, weight, scale, bias, steps, stride, padding, dilation, groups))


def fake(input, weight, scale, bias, steps, *rest):
    return empty_real(input, geometry(input, weight, *rest)[0], None, True)


def reference(input, weight, scale, bias, steps, stride, padding, dilation, groups):
    _, stride, (top, bottom, left, right), dilation = geometry(input, weight, stride, padding,
                                                               dilation, groups)
    a = F.pad(_int8.quantize(input, steps), (left, right, top, bottom))
    filters = weight if len(weight) else weight.new_zeros(groups, *weight.shape[1:])
    dot = F.conv2d(a.contiguous(), filters.double().contiguous(), None, stride, 0, dilation, groups)
    return _int8.finish(dot[:, : len(weight)].round(), scale, bias, 1)


def samples(v):
    image, filters = v.real(2, 19, 5, 6), v.integers(-128, 128, 33, 19, 3, 3).to(torch.int8)
    scale, bias = v.real(33) / 64, v.real(33)
    grouped = v.integers(-127, 128, 6, 3, 1, 2).to(torch.int8)
    special = v.real(1, 6, 4, 5)
    special[0, :3, 0, 0] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    return [
        Sample((image, filters, scale, bias, 2.0)),  # many halves
        Sample((channels_last(image), filters, scale, None, 33.3, (2, 1), (1, 0, 2, 1), (1, 2))),
        Sample((special, grouped, v.real(6), v.real(6), 100.0, (1,), (1,), (1,), 2)),
        Sample((v.real(2, 4, 3, 6).transpose(1, 3), grouped[:, :, :, :1].contiguous(), v.real(6),
                None, 7.5, (2,), (0,), (1,), 2))]


define(Operator(
    schemas=("int8_conv2d(Tensor input, Tensor weight, Tensor scale, Tensor? bias, float steps, "
             "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1) -> Tensor",),
    group="Real layers in int8", check=check, fake=fake, reference=reference, samples=samples,
    batched=images("input"),
    text=f"""
Convolution of an image, rounded to int8, with int8 filters: exact sums in int32.

An activation becomes round(input * steps), halves to even, clamped to [-127, 127]; NaN becomes 0.
The result is float32(sum) * scale, then + bias, one rounding each, so every backend gives the same
bits. Padding is exactly 0. On CPUs it runs on integer dot products; GPUs run the reference, in
float64. The filters are arranged in each call; a network of convert(real="int8") in the C++ engine
arranges them once.

Arguments:
  input: float32 (N, Cin, H, W).
  weight: int8 (Cout, Cin / groups, kh, kw), of at most {_int8.MOST_PRODUCTS} products a sum.
{_int8.ARGUMENTS}  stride: one or two integers, at least 1.
  padding: one, two (height, width) or four (top, bottom, left, right) integers, at least 0.
  dilation: one or two integers, at least 1.
  groups: a divisor of the input's and the output's channels.
Returns:
  float32 (N, Cout, OH, OW), channels-last.
Errors:
  tensors of another type, rank or width, sums that int32 may not hold, steps that are no positive
  number, geometry that does not fit, an argument that requires a gradient: there is none.
Example:
  >>> x, weight = torch.rand(1, 64, 8, 8), torch.randn(32, 64, 3, 3)
  >>> step = weight.abs().amax((1, 2, 3)) / 127
  >>> filters = (weight / step.view(-1, 1, 1, 1)).round().to(torch.int8)
  >>> y = ops.int8_conv2d(x, filters, step / 127, None, 127.0, padding=1)
  >>> bool((y - F.conv2d(x, weight, padding=1)).abs().max() < 1)
  True
"""))
