"""What ONNX gets, which has no binary operators: float convolutions and products of -1 and +1.

`torch.onnx.export(..., dynamo=True)` decomposes the exported program, and the kernels of the
differentiable operators then run these functions, of PyTorch's own operators. They are exact, as
the operators are, while a dot product fits float32 (K <= 2^24). Packed layers call theirs
themselves: the file keeps the int32 words, 1 bit a weight (but of small layers, which the exporter
unpacks), and unpacks them; runtimes do that once, when they load a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.ops._contract import sign


def is_exporting() -> bool:
    """Whether `torch.onnx.export` traces this code. Raises in its old form, by TorchScript."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError("bitkernels: torch.onnx.export(..., dynamo=False) cannot take apart the "
                           "binary operators; call it with dynamo=True, its default")
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def binary_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
                  conv, train) -> Tensor:
    return _conv2d(input, sign(weight).float(), bias, scale, conv.stride, conv.pad,
                   conv.dilation, conv.groups, conv.pad_value,
                   train.dtype or input.dtype)


def binary_linear(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
                  train) -> Tensor:
    return _linear(input, sign(weight).float(), bias, scale, train.dtype or input.dtype)


def binary_conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None,
                            scale: Tensor | None, conv, train) -> Tensor:
    dot = F.conv_transpose2d(
        sign(input).float(), sign(weight).float(), None, conv.stride, conv.padding,
        conv.output_padding, conv.groups, conv.dilation)
    return epilogue(dot, scale, bias, (-1, 1, 1)).to(train.dtype or input.dtype)


def packed_conv2d(input: Tensor, words: Tensor, channels: int, stride, pad, dilation, groups: int,
                  pad_value: int, scale: Tensor | None, bias: Tensor | None,
                  dtype: torch.dtype) -> Tensor:
    weight = unpack(words, channels // groups).movedim(-1, 1)
    return _conv2d(input, weight, bias, scale, stride, pad, dilation, groups, pad_value, dtype)


def packed_conv_transpose2d(input: Tensor, words: Tensor, channels: int, stride, padding,
                            output_padding, groups: int, dilation, scale: Tensor | None,
                            bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = unpack(words, channels // groups).movedim(-1, 1)  # by output channel
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    dot = F.conv_transpose2d(sign(input).float(), weight, None, stride, padding, output_padding,
                             groups, dilation)
    return epilogue(dot, scale, bias, (-1, 1, 1)).to(dtype)


def packed_linear(input: Tensor, words: Tensor, channels: int, scale: Tensor | None,
                  bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _linear(input, unpack(words, channels), bias, scale, dtype)


def unpack(words: Tensor, channels: int) -> Tensor:
    """The signs (..., channels) in float32.

    By remainders, which are exact: ONNX shifts no signed integers, and the exporter divides them in
    float32.
    """
    powers = torch.tensor([2**i for i in range(32)], dtype=torch.int64)
    bits = words.long().unsqueeze(-1) % (2 * powers) >= powers
    return torch.where(bits, 1.0, -1.0).flatten(-2)[..., :channels]


def _conv2d(input, weight, bias, scale, stride, pad, dilation, groups, pad_value, dtype) -> Tensor:
    dot = conv2d_of_signs(sign(input).float(), weight, stride, pad, dilation, groups, pad_value)
    return epilogue(dot, scale, bias, (-1, 1, 1)).to(dtype)


def conv2d_of_signs(x: Tensor, weight: Tensor, stride, pad, dilation, groups: int,
                    pad_value: int) -> Tensor:
    """The dot products of -1 and +1, x being (N, C, H, W), with padding of that value."""
    pad = tuple(pad) * (2 if len(pad) == 1 else 1)
    if len(pad) == 2:
        pad = (pad[0], pad[0], pad[1], pad[1])
    top, bottom, left, right = pad
    if pad_value or top != bottom or left != right:
        x, pad = F.pad(x, (left, right, top, bottom), value=float(pad_value)), (0, 0)
    else:
        pad = top, left
    return F.conv2d(x, weight, None, stride, pad, dilation, groups)


def _linear(input, weight, bias, scale, dtype) -> Tensor:
    return epilogue(sign(input).float() @ weight.T, scale, bias, (-1,)).to(dtype)


def epilogue(dot: Tensor, scale: Tensor | None, bias: Tensor | None, shape) -> Tensor:
    # The sum is an integer already. Exporters and runtimes would fold the scale, or a batch norm
    # that follows, into the weights; then sums round, and signs of what should be 0 flip.
    dot = dot.round()
    if scale is not None:
        dot = dot * scale.float().view(shape)
    return dot if bias is None else dot + bias.float().view(shape)
