"""Sizes and layouts: words, padding, outputs of convolutions, and tensors allocated for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitkernels.ops._checks import (
    INT_MAX,
    check_same_device,
    describe,
    fail,
)

TILE = 16  # output channels per weight tile: one AVX-512 register of 32-bit lanes


def word_count(channels: int) -> int:
    return (channels + 31) // 32


def check_words(op: str, arg: str, t: Tensor, channels: int, ndim: int | None = None) -> None:
    if t.dtype != torch.int32:
        fail(op, arg, "int32 words", describe(t))
    if ndim is not None and t.dim() != ndim:
        fail(op, arg, f"{ndim}-dimensional", describe(t))
    if channels < 1:
        fail(op, "channels", "at least 1", channels)
    if t.dim() < 1 or t.shape[-1] != word_count(channels):
        fail(op, arg, f"{word_count(channels)} words wide for {channels} channels", describe(t))


def pair(op: str, arg: str, value, minimum: int) -> tuple[int, int]:
    if len(value) != 2 and len(value) != 1:
        fail(op, arg, "one or two integers", list(value))
    first, second = value[0], value[-1]
    if first < minimum or second < minimum:
        fail(op, arg, f"at least {minimum}", list(value))
    if first > INT_MAX or second > INT_MAX:
        fail(op, arg, "below 2^31", list(value))
    return first, second


def padding4(op: str, padding) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a padding given as 1, 2 (height, width) or 4 integers."""
    if len(padding) not in (1, 2, 4):
        fail(op, "padding", "one, two (height, width) or four (top, bottom, left, right) integers",
             list(padding))
    if min(padding) < 0:
        fail(op, "padding", "at least 0", list(padding))
    if max(padding) > INT_MAX:
        fail(op, "padding", "below 2^31", list(padding))
    if len(padding) == 4:
        return tuple(padding)
    return padding[0], padding[0], padding[-1], padding[-1]


def same_padding(op: str, padding: str, kernel, stride, dilation) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) for 'same' and 'valid', split as `torch.nn.functional.conv2d`."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        fail(op, "padding", "'same', 'valid' or integers", repr(padding))
    if any(s != 1 for s in stride):
        fail(op, "stride", "1 with padding='same'", list(stride))
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2


def conv_output_size(op: str, size, kernel, stride, pad, dilation) -> tuple[int, int]:
    top, bottom, left, right = pad
    return (_output_size(op, size[0] + top + bottom, kernel[0], stride[0], dilation[0]),
            _output_size(op, size[1] + left + right, kernel[1], stride[1], dilation[1]))


def _output_size(op: str, padded: int, kernel: int, stride: int, dilation: int) -> int:
    reach = dilation * (kernel - 1) + 1
    if padded < reach:
        fail(op, "kernel", f"at most the padded input size {padded}", f"a reach of {reach}")
    return (padded - reach) // stride + 1


def pooled_size(op: str, size, kernel_size, stride, padding, dilation, ceil_mode):
    """Checked kernel, stride, padding, dilation and (OH, OW) of a pooling of images of a size."""
    kernel = pair(op, "kernel_size", kernel_size, 1)
    stride = pair(op, "stride", stride, 1) if len(stride) else kernel
    padding, dilation = pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1)
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        if 2 * p > k:
            fail(op, "padding", "at most half of kernel_size", list(padding))
        reach = d * (k - 1) + 1
        if n + 2 * p < reach:
            fail(op, "kernel_size", f"at most the padded input size {n + 2 * p}",
                 f"a reach of {reach}")
        o = (n + 2 * p - reach + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (o - 1) * s >= n + p:  # the last window must start inside the image
            o -= 1
        out.append(o)
    return kernel, stride, padding, dilation, (out[0], out[1])


def check_padded(op: str, pad, oh: int, ow: int) -> None:
    """Padding alone must not ask for more memory than there can be."""
    if max(pad) > 2**20 and oh * ow > 2**40:
        fail(op, "padding", "such that the output has at most 2^40 pixels", f"{oh} x {ow}")


def check_groups(op: str, channels: int, out_channels: int, groups: int) -> None:
    if groups < 1 or channels % groups or out_channels % groups:
        fail(op, "groups", f"a divisor of {channels} input and {out_channels} output channels",
             groups)


def check_products(op: str, weight_words: Tensor, products: int) -> None:
    if products > INT_MAX:
        fail(op, "weight_words", "of less than 2^31 products in a sum", describe(weight_words))


def weight_shape(op: str, weight_words: Tensor, out_channels: int | None, groups: int) -> list[int]:
    """(Cout, *rest) of canonical or tiled filter words; tiled ones have one more dimension."""
    canonical = 4 if op == "packed_conv2d" else 2
    if weight_words.dtype != torch.int32:
        fail(op, "weight_words", "int32 words", describe(weight_words))
    shape = list(weight_words.shape)
    if len(shape) == canonical:
        if out_channels is not None and out_channels != shape[0]:
            fail(op, "out_channels", f"{shape[0]}, the first size of weight_words", out_channels)
        return shape
    if len(shape) != canonical + 1 or shape[-1] != TILE:
        fail(op, "weight_words", f"{canonical}-dimensional, or tiled by tile_weight",
             describe(weight_words))
    if groups < 1:
        fail(op, "groups", "at least 1", groups)
    cout = shape[0] * TILE if out_channels is None else out_channels
    if cout < 1 or cout % groups or groups * ((cout // groups + TILE - 1) // TILE) != shape[0]:
        fail(op, "out_channels", f"what {shape[0]} tiles of {TILE} hold", cout)
    return [cout, *shape[1:-1]]


def conv_geometry(op: str, words, weight_words, channels, stride, padding, dilation, groups,
                  pad_value, out_channels):
    """Checked (N, Cout, OH, OW), stride, (top, bottom, left, right), dilation."""
    check_words(op, "words", words, channels, 4)
    shape = weight_shape(op, weight_words, out_channels, groups)
    check_same_device(op, words, weight_words=weight_words)
    check_groups(op, channels, shape[0], groups)
    if shape[3] != word_count(channels // groups):
        fail(op, "weight_words", f"{word_count(channels // groups)} words wide for "
             f"{channels // groups} channels per group", describe(weight_words))
    if pad_value not in (-1, 0, 1):
        fail(op, "pad_value", "-1, 0 or 1", pad_value)
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    pad = padding4(op, padding)
    if shape[1] < 1 or shape[2] < 1:
        fail(op, "weight_words", "a filter of at least 1x1", describe(weight_words))
    check_products(op, weight_words, shape[1] * shape[2] * (channels // groups))
    oh, ow = conv_output_size(op, words.shape[1:3], shape[1:3], stride, pad, dilation)
    check_padded(op, pad, oh, ow)
    return (words.shape[0], shape[0], oh, ow), stride, pad, dilation


def linear_geometry(op: str, words, weight_words, channels, out_channels):
    check_words(op, "words", words, channels)
    shape = weight_shape(op, weight_words, out_channels, 1)
    check_same_device(op, words, weight_words=weight_words)
    if shape[1] != word_count(channels):
        fail(op, "weight_words", f"{word_count(channels)} words wide for {channels} channels",
             describe(weight_words))
    check_products(op, weight_words, channels)
    return (*words.shape[:-1], shape[0])


def wants_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's real output is channels-last: as torch, if either operand is."""
    if input.is_contiguous() and weight.is_contiguous():
        return False
    return is_channels_last(input) or is_channels_last(weight)


def is_channels_last(t: Tensor) -> bool:
    """By the strides: within torch.vmap tensors do not answer for this format."""
    if t.dim() != 4 or t.is_contiguous():
        return False
    n, c, h, w = t.shape
    step_n, step_c, step_h, step_w = t.stride()
    return ((c == 1 or step_c == 1) and (w == 1 or step_w == c) and (h == 1 or step_h == c * w)
            and (n == 1 or step_n == c * h * w))


def empty_around(t: Tensor, dim: int) -> Tensor:
    """An empty tensor like `t`: dense with `dim` innermost if `t` is, else contiguous."""
    step = t.shape[dim]
    innermost = step == 1 or t.stride(dim) == 1
    for i in reversed(range(t.dim())):
        if i != dim:
            innermost = innermost and (t.shape[i] == 1 or t.stride(i) == step)
            step = step * t.shape[i]
    if innermost:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def empty_real(like: Tensor, shape, dtype, channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or torch.float32, device=like.device,
                       memory_format=format)


def empty_words(like: Tensor, shape, channels: int) -> Tensor:
    return like.new_empty((*shape, word_count(channels)), dtype=torch.int32)


class ConvSpec(NamedTuple):
    """The geometry of a convolution, checked once where its operator is entered."""

    stride: tuple[int, int]
    pad: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    groups: int
    pad_value: int

    def output_size(self, size, kernel) -> tuple[int, int]:
        return conv_output_size("", size, kernel, self.stride, self.pad, self.dilation)
