"""The real gradients of a binary convolution, by tables of bits or by PyTorch's convolution."""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels._dispatch import in_memory_format
from bitkernels.ops._checks import HALVES
from bitkernels.ops._record import inside
from bitkernels.ops.geometry import ConvSpec

ops = torch.ops.bitkernels


def scaled_signs(weight: Tensor, words: Tensor, scale: Tensor | None, dtype) -> Tensor:
    """The weight's signs, from its packed ones, times the scale."""
    signs = inside(words)("unpack", words, weight.shape[1], dtype, 1)
    return signs if scale is None else signs * scale.view(-1, *[1] * (signs.dim() - 1)).to(dtype)


def conv2d_backward(grad, words, weight, weight_words, scale, conv: ConvSpec, wants_input: bool,
                    wants_weight: bool):
    """Real gradients of (input's signs, weight's unscaled signs), None where not wanted.

    The unscaled output gradient meets scaled weights: its product with the input is then the
    gradient of the unscaled signs, from which every rule for the weight follows.
    """
    grad = in_memory_format(grad, torch.channels_last)  # as the words; once for both
    by_input, by_weight = by_tables(grad, weight, conv)
    by_input = by_input and 0 not in words.shape[1:3]
    channels = weight.shape[1] * conv.groups
    grad_input = grad_signs = None
    if wants_weight and by_weight:
        grad_signs = ops.packed_conv2d_weight_grad.default(
            grad, words, channels, weight.shape[2:], conv.stride, conv.pad,
            conv.dilation, conv.pad_value)
    elif wants_weight:
        grad_signs = _weight_grad(grad, words, weight, conv)
    if wants_input and by_input:
        grad_input = ops.packed_conv2d_input_grad.default(
            grad, weight_words, channels, scale, words.shape[1:3], conv.pad, conv.dilation)
    elif wants_input:
        grad_input = _input_grad(grad, words, weight, weight_words, scale, conv)
    return grad_input, grad_signs


def in_one_pass(grad: Tensor, rounded: Tensor | None, conv: ConvSpec) -> bool:
    """Whether `packed_conv2d_sign_backward` takes a gradient to the input, not the library and then
    `sign_backward`: one that is rounded to float8, on tensor cores that take it, and any of 16 bits
    where it is asked for, since no GPU has timed it."""
    if (not grad.is_cuda or conv.groups != 1 or conv.stride != (1, 1) or grad.shape[1] % 16
            or grad.dtype not in HALVES):
        return False
    if rounded is not None:
        return torch.cuda.get_device_capability(grad.device) >= (8, 9)
    return os.environ.get("BITKERNELS_ONE_PASS") == "1"


@functools.cache
def _has_amx() -> bool:
    return torch.cpu.get_capabilities().get("amx_bf16", False)


def by_tables(grad: Tensor, weight: Tensor, conv: ConvSpec) -> tuple[bool, bool]:
    """Whether the operators on bits are faster than the library, for (input, weight): where a table
    is read often enough for the time to make it (measured, docs/performance.md)."""
    if grad.device.type != "cpu" or grad.dtype == torch.float64 or conv.groups != 1:
        return False, False
    cout, cin, kh, kw = weight.shape
    taps = kh * kw
    by_input = grad.dtype == torch.float32 and conv.stride == (1, 1) and cout >= 32 and (
        cin >= 128 or (cin >= 64 and taps >= 9))
    by_weight = (cout >= 64 and cin * taps >= 512) or (cout >= 128 and cin * taps >= 128)
    if grad.dtype == torch.bfloat16 and _has_amx():
        by_weight = by_weight and cin >= 512
    return by_input, by_weight


def _sees_every_tap(pixels: int, windows: int, kernel: int, stride: int, padding: int,
                    dilation: int) -> bool:
    """Along an axis: each tap of the kernel surely meets a pixel, not padding alone."""
    return (stride <= pixels and (kernel - 1) * dilation - padding < pixels
            and padding <= (windows - 1) * stride)


def library_backward(grad, x, weight, stride, padding, dilation, groups, mask, transposed=False,
                     output_padding=(0, 0)):
    """PyTorch's gradients of (x, weight), as `mask` asks; 0 where it refuses sums of nothing, and
    without two faults that it has on CPUs.

    In bfloat16 (torch 2.13) the gradients of taps that meet padding alone are memory that nothing
    was written to, so these run in float32. And to one output channel a transposed convolution's
    gradient of x is wrong in memory formats that differ, so there all are contiguous.
    """
    if weight.shape[0] == 0 or 0 in x.shape[2:]:
        return torch.zeros_like(x), torch.zeros_like(weight)
    dtype = grad.dtype
    if grad.device.type == "cpu" and dtype == torch.bfloat16 and mask[1]:
        image, windows = (grad, x) if transposed else (x, grad)
        axes = zip(image.shape[2:], windows.shape[2:], weight.shape[2:], stride, padding, dilation,
                   strict=True)
        if not all(_sees_every_tap(*axis) for axis in axes):
            grad, x, weight = grad.float(), x.float(), weight.float()
    if transposed and grad.device.type == "cpu" and weight.shape[1] == 1:
        grad, x, weight = (t.contiguous().view(-1).view(t.shape) for t in (grad, x, weight))
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, transposed, output_padding, groups,
        (*mask, False))[:2]
    return found if grad.dtype == dtype else [None if t is None else t.to(dtype) for t in found]


def _input_grad(grad, words, weight, weight_words, scale, conv) -> Tensor:
    """Of the input's signs, by PyTorch's convolution backward; the same for any pad_value."""
    top, bottom, left, right = conv.pad
    size, channels = words.shape[1:3], weight.shape[1] * conv.groups
    uneven = top != bottom or left != right
    if uneven:
        size = size[0] + top + bottom, size[1] + left + right
    x, shape = grad, (grad.shape[0], channels, *size)  # of which only shape and layout are read
    if x.shape != shape:
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device,
                        memory_format=torch.channels_last)
    scaled = scaled_signs(weight, weight_words, scale, grad.dtype)
    grad_input = library_backward(grad, x, scaled, conv.stride, (0, 0) if uneven else (top, left),
                                  conv.dilation, conv.groups, (True, False))[0]
    if uneven:
        height, width = words.shape[1:3]
        grad_input = grad_input[:, :, top : top + height, left : left + width]
    return grad_input


def _weight_grad(grad, words, weight, conv) -> Tensor:
    """Of the weight's signs, by PyTorch's convolution backward."""
    x = inside(words)("unpack", words, weight.shape[1] * conv.groups, grad.dtype, 1)
    top, bottom, left, right = conv.pad
    explicit = conv.pad_value != 0 or top != bottom or left != right
    if explicit:
        x = F.pad(x, (left, right, top, bottom), value=float(conv.pad_value))
    return library_backward(grad, x, grad.new_empty(weight.shape), conv.stride,
                            (0, 0) if explicit else (top, left), conv.dilation, conv.groups,
                            (False, True))[1]
