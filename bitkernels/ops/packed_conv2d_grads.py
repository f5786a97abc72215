"""packed_conv2d_input_grad and packed_conv2d_weight_grad: real gradients of a convolution, from
bits. One group; the input's at stride 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bitkernels.ops._checks import (
    check_channel_vector,
    check_real,
    check_same_device,
    describe,
    fail,
)
from bitkernels.ops._contract import as_rows, signs, wide
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, each, images
from bitkernels.ops.geometry import check_words, conv_output_size, empty_real, padding4, pair


def check_weight(grad, words, channels, kernel_size, stride=(1,), padding=(0,), dilation=(1,),
                 pad_value=0):
    op = "packed_conv2d_weight_grad"
    check_real(op, "grad", grad)
    if grad.dim() != 4 or grad.dtype == torch.float64:
        fail(op, "grad", "float32, float16 or bfloat16 of shape (N, Cout, OH, OW)", describe(grad))
    check_words(op, "words", words, channels, 4)
    check_same_device(op, grad, words=words)
    if pad_value not in (-1, 0, 1):
        fail(op, "pad_value", "-1, 0 or 1", pad_value)
    kernel = pair(op, "kernel_size", kernel_size, 1)
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    pad = padding4(op, padding)
    size = conv_output_size(op, words.shape[1:3], kernel, stride, pad, dilation)
    shape = (words.shape[0], grad.shape[1], *size)
    if grad.shape != shape:
        fail(op, "grad", f"of shape {tuple(shape)}", describe(grad))
    return Call((grad, words, channels, kernel, stride, pad, dilation, pad_value))


def fake_weight(grad, words, channels, kernel, *_):
    return empty_real(grad, (grad.shape[1], channels, *kernel), torch.float32, True)


def reference_weight(grad, words, channels, kernel_size, stride, pad, dilation, pad_value):
    """Gradient (Cout, channels, kh, kw) of the weight's signs, float32, channels-last."""
    if grad.shape[1] == 0:  # which the library refuses
        return grad.new_empty(0, channels, *kernel_size, dtype=torch.float32)
    top, bottom, left, right = pad
    grad = wide(grad)
    x = F.pad(signs(words, channels, grad.dtype, dim=1), (left, right, top, bottom),
              value=float(pad_value))
    weight = grad.new_empty((grad.shape[1], channels, *kernel_size))
    _, out, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, (0, 0), dilation, False, (0, 0), 1, (False, True, False))
    return as_rows(out.float())


def samples_weight(v):
    words = v.words(2, 5, 6, 37)
    return [Sample((channels_last(v.real(2, 19, 2, 7)), words, 37, (3, 3), (2, 1), (1, 0, 2, 1),
                    (1, 1), 1)),
            Sample((v.real(2, 3, 5, 6).bfloat16(), words, 37, (1,)))]


def check_input(grad, weight_words, channels, scale, input_size, padding=(0,), dilation=(1,)):
    op = "packed_conv2d_input_grad"
    check_words(op, "weight_words", weight_words, channels, 4)
    check_real(op, "grad", grad)
    if grad.dim() != 4 or grad.shape[1] != weight_words.shape[0]:
        fail(op, "grad", f"of shape (N, {weight_words.shape[0]}, OH, OW)", describe(grad))
    check_same_device(op, grad, weight_words=weight_words, scale=scale)
    check_channel_vector(op, "scale", scale, grad.shape[1])
    input_size = pair(op, "input_size", input_size, 1)
    if grad.dtype == torch.float64:
        fail(op, "grad", "float32, float16 or bfloat16 of shape (N, Cout, OH, OW)", describe(grad))
    dilation, pad = pair(op, "dilation", dilation, 1), padding4(op, padding)
    size = conv_output_size(op, input_size, weight_words.shape[1:3], (1, 1), pad, dilation)
    shape = (grad.shape[0], grad.shape[1], *size)
    if grad.shape != shape:
        fail(op, "grad", f"of shape {tuple(shape)}", describe(grad))
    return Call((grad, weight_words, channels, scale, input_size, pad, dilation))


def fake_input(grad, weight_words, channels, scale, input_size, *_):
    return empty_real(grad, (grad.shape[0], channels, *input_size), grad.dtype, True)


def reference_input(grad, weight_words, channels, scale, input_size, pad, dilation):
    """Gradient (N, channels, *input_size) of the input of a convolution of stride 1."""
    if grad.shape[1] == 0:  # a sum of nothing, which the library refuses
        return as_rows(grad.new_zeros(grad.shape[0], channels, *input_size))
    top, bottom, left, right = pad
    weight = signs(weight_words, channels, grad.dtype, dim=1)
    if scale is not None:
        weight = weight * scale.view(-1, 1, 1, 1).to(grad.dtype)
    height, width = input_size[0] + top + bottom, input_size[1] + left + right
    x = grad.new_empty((grad.shape[0], channels, height, width))
    out, _, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (0, 0), dilation, False, (0, 0), 1, (True, False, False))
    return as_rows(out[:, :, top : top + input_size[0], left : left + input_size[1]])


def samples_input(v):
    filters = v.words(19, 3, 3, 37)
    return [Sample((v.real(2, 19, 5, 6), filters, 37, v.real(19), (5, 6), (1,))),
            Sample((channels_last(v.real(2, 19, 4, 5)).half(), filters, 37, None, (5, 6),
                    (1, 0, 0, 1), (1,)))]


define(Operator(
    schemas=("packed_conv2d_weight_grad(Tensor grad, Tensor words, SymInt channels, "
             "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
             "int pad_value=0) -> Tensor",),
    group="Products of bits", check=check_weight, fake=fake_weight, reference=reference_weight,
    samples=samples_weight, batched=each,
    text="""
Gradient of the signs of a convolution's weight, from the gradient of its output and the packed
signs of its input. One group.

Arguments:
  grad: float32, float16 or bfloat16 (N, Cout, OH, OW).
  words: int32 (N, H, W, ceil(channels / 32)).
  channels: of the input.
  kernel_size: (kh, kw).
  stride: one or two integers, at least 1.
  padding: as of packed_conv2d.
  dilation: one or two integers, at least 1.
  pad_value: as of packed_conv2d.
Returns:
  float32 (Cout, channels, kh, kw), channels-last.
Errors:
  a grad of another type or shape than the convolution's output, words that do not fit.
Example:
  >>> words = ops.sign_pack(torch.randn(1, 32, 6, 6), dim=1)
  >>> ops.packed_conv2d_weight_grad(torch.randn(1, 8, 4, 4), words, 32, 3).shape
  torch.Size([8, 32, 3, 3])
"""))
define(Operator(
    schemas=("packed_conv2d_input_grad(Tensor grad, Tensor weight_words, SymInt channels, "
             "Tensor? scale, SymInt[2] input_size, int[2] padding=0, int[2] dilation=1)"
             " -> Tensor",),
    group="Products of bits", check=check_input, fake=fake_input, reference=reference_input,
    samples=samples_input, batched=images("grad"),
    text="""
Gradient of the input of a convolution of stride 1 and one group, from the gradient of its output
and the packed signs of its weight.

Arguments:
  grad: float32, float16 or bfloat16 (N, Cout, OH, OW).
  weight_words: int32 (Cout, kh, kw, ceil(channels / 32)).
  channels: of the input.
  scale: (Cout,) real, a factor of the weight; None: none.
  input_size: (H, W) of the input.
  padding: as of packed_conv2d, with zeros.
  dilation: one or two integers, at least 1.
Returns:
  (N, channels, H, W) in grad's dtype, channels-last.
Errors:
  a grad of another type or shape than the convolution's output, words and vectors that do not fit.
Example:
  >>> filters = ops.sign_pack(torch.randn(8, 32, 3, 3), dim=1)
  >>> grad = torch.randn(1, 8, 6, 6)
  >>> ops.packed_conv2d_input_grad(grad, filters, 32, None, (6, 6), padding=1).shape
  torch.Size([1, 32, 6, 6])
"""))
