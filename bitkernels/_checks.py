"""Argument checks and shape arithmetic of the operators, one function an operator.

Every failure is a RuntimeError that names the operator and the argument, what it takes and what it
got. `csrc/register.cpp` says the same words for the C++ engine.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

TILE = 16  # output channels per weight tile: one AVX-512 register of 32-bit lanes
REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT_MAX = 2**31 - 1
ESTIMATORS = ("ste_sign", "approx_sign", "swish_sign", "identity", "none")


def fail(op: str, arg: str, takes: str, got: object) -> NoReturn:
    raise RuntimeError(f"bitkernels::{op}: {arg} must be {takes}, got {got}")


def describe(t: Tensor) -> str:
    return f"{str(t.dtype)[6:]} of shape {tuple(t.shape)}"


def word_count(channels: int) -> int:
    return (channels + 31) // 32


def check_real(op: str, arg: str, t: Tensor, ndim: int | None = None) -> None:
    if t.dtype not in REAL:
        fail(op, arg, "float32, float16, bfloat16 or float64", describe(t))
    if ndim is not None and t.dim() != ndim:
        fail(op, arg, f"{ndim}-dimensional", describe(t))


def check_words(op: str, arg: str, t: Tensor, channels: int, ndim: int | None = None) -> None:
    if t.dtype != torch.int32:
        fail(op, arg, "int32 words", describe(t))
    if ndim is not None and t.dim() != ndim:
        fail(op, arg, f"{ndim}-dimensional", describe(t))
    if channels < 1:
        fail(op, "channels", "at least 1", channels)
    if t.dim() < 1 or t.shape[-1] != word_count(channels):
        fail(op, arg, f"{word_count(channels)} words wide for {channels} channels", describe(t))


def check_same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    device = first.device
    for arg, t in others.items():
        if t is not None and t.device != device:
            fail(op, arg, f"on {device} as the first argument", t.device)


def check_channel_vector(op: str, arg: str, t: Tensor | None, channels: int) -> None:
    if t is None:
        return
    check_real(op, arg, t)
    if t.dim() != 1 or t.shape[0] != channels:
        fail(op, arg, f"of shape ({channels},)", describe(t))


def normalize_dim(op: str, t: Tensor, dim: int) -> int:
    if not -t.dim() <= dim < t.dim():
        fail(op, "dim", f"in [{-t.dim()}, {t.dim() - 1}]", dim)
    return dim % t.dim()


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


def check_padded(op: str, pad, oh: int, ow: int) -> None:
    """Padding alone must not ask for more memory than there can be."""
    if max(pad) > 2**20 and oh * ow > 2**40:
        fail(op, "padding", "such that the output has at most 2^40 pixels", f"{oh} x {ow}")


def check_groups(op: str, channels: int, out_channels: int, groups: int) -> None:
    if groups < 1 or channels % groups or out_channels % groups:
        fail(op, "groups", f"a divisor of {channels} input and {out_channels} output channels",
             groups)


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


def check_epilogue(op: str, words: Tensor, out_shape, cout: int, *, clamp_min=None, clamp_max=None,
                   scale=None, bias=None, residual=None, shift_in=None, slope=None, shift_out=None,
                   dtype=None, sign_shift=None, threshold=None) -> None:
    vectors = dict(scale=scale, bias=bias, shift_in=shift_in, slope=slope, shift_out=shift_out,
                   sign_shift=sign_shift)
    check_same_device(op, words, residual=residual, threshold=threshold, **vectors)
    for arg, t in vectors.items():
        check_channel_vector(op, arg, t, cout)
    for arg, bound in (("clamp_min", clamp_min), ("clamp_max", clamp_max)):
        if bound is not None and bound != bound:
            fail(op, arg, "a number", "nan")
    if slope is None and (shift_in is not None or shift_out is not None):
        fail(op, "slope", "given with shift_in or shift_out", None)
    if residual is not None:
        check_real(op, "residual", residual)
        if tuple(residual.shape) != tuple(out_shape):
            fail(op, "residual", f"of shape {tuple(out_shape)}", describe(residual))
    real_part = any(v is not None for v in (clamp_min, clamp_max, residual, *vectors.values()))
    if dtype == torch.int32:
        if real_part:
            fail(op, "dtype", "a real type when the epilogue has scale, bias, ...", dtype)
    elif dtype is not None and dtype not in REAL:
        fail(op, "dtype", "float32, float16, bfloat16, float64 or int32", dtype)
    if threshold is not None:
        if threshold.dtype != torch.int32 or tuple(threshold.shape) != (2, cout):
            fail(op, "threshold", f"int32 of shape (2, {cout})", describe(threshold))
        if real_part:
            fail(op, "threshold", "alone, without scale, bias, ...", "both")


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
    return (*words.shape[:-1], shape[0])


def check_train(op: str, input, weight, bias, scale, input_estimator, input_clip, weight_estimator,
                weight_clip, dtype, ndim: int) -> None:
    check_real(op, "input", input)
    check_real(op, "weight", weight, ndim)
    check_same_device(op, input, weight=weight)
    if bias is not None or scale is not None:
        check_same_device(op, input, bias=bias, scale=scale)
        check_channel_vector(op, "bias", bias, weight.shape[0])
        check_channel_vector(op, "scale", scale, weight.shape[0])
    check_estimator(op, "input_estimator", input_estimator)
    check_estimator(op, "weight_estimator", weight_estimator)
    check_clip(op, "input_clip", input_clip)
    check_clip(op, "weight_clip", weight_clip)
    if dtype is not None and dtype not in REAL:
        fail(op, "dtype", "float32, float16, bfloat16 or float64", dtype)


def check_estimator(op: str, arg: str, name: str) -> None:
    if name not in ESTIMATORS:
        fail(op, arg, f"one of {', '.join(ESTIMATORS)}", repr(name))


def check_binary_conv2d(input, weight, bias, stride, padding, dilation, groups, *, pad_value, scale,
                        input_estimator, input_clip, weight_estimator, weight_clip, dtype,
                        op="binary_conv2d"):
    """Checked ((N, Cout, OH, OW), stride, (top, bottom, left, right), dilation)."""
    check_train(op, input, weight, bias, scale, input_estimator, input_clip, weight_estimator,
                weight_clip, dtype, 4)
    if input.dim() not in (3, 4):
        fail(op, "input", "(N, C, H, W) or (C, H, W)", describe(input))
    channels, (cout, per_group, *kernel) = input.shape[-3], weight.shape
    if groups < 1 or cout % groups:
        fail(op, "groups", f"a divisor of {cout} output channels", groups)
    if per_group * groups != channels:
        fail(op, "input", f"{per_group * groups} channels wide for a weight of shape "
             f"{tuple(weight.shape)}" + (f" in {groups} groups" if groups > 1 else ""),
             f"{channels} channels in {describe(input)}")
    if channels < 1:
        fail(op, "input", "at least 1 channel wide", describe(input))
    if pad_value not in (-1, 0, 1):
        fail(op, "pad_value", "-1, 0 or 1", pad_value)
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        pad = same_padding(op, padding, kernel, stride, dilation)
    else:
        pad = padding4(op, padding)
    oh, ow = conv_output_size(op, input.shape[-2:], kernel, stride, pad, dilation)
    check_padded(op, pad, oh, ow)
    return (*input.shape[:-3], cout, oh, ow), stride, pad, dilation


def check_binary_linear(input, weight, bias, *, scale, input_estimator, input_clip,
                        weight_estimator, weight_clip, dtype):
    op = "binary_linear"
    check_train(op, input, weight, bias, scale, input_estimator, input_clip, weight_estimator,
                weight_clip, dtype, 2)
    if input.dim() < 1 or input.shape[-1] != weight.shape[1] or weight.shape[1] < 1:
        fail(op, "input", f"(..., {weight.shape[1]}) for a weight of shape "
             f"{tuple(weight.shape)}", describe(input))
    return (*input.shape[:-1], weight.shape[0])


def pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode):
    op = "packed_max_pool2d"
    if words.dtype != torch.int32 or words.dim() != 4:
        fail(op, "words", "int32 words of shape (N, H, W, words)", describe(words))
    kernel = pair(op, "kernel_size", kernel_size, 1)
    stride = pair(op, "stride", stride, 1) if len(stride) else kernel
    padding, dilation = pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1)
    out = []
    for axis in (0, 1):
        size, k, s, p, d = (words.shape[1 + axis], kernel[axis], stride[axis], padding[axis],
                            dilation[axis])
        if 2 * p > k:
            fail(op, "padding", "at most half of kernel_size", list(padding))
        reach = d * (k - 1) + 1
        if size + 2 * p < reach:
            fail(op, "kernel_size", f"at most the padded input size {size + 2 * p}",
                 f"a reach of {reach}")
        o = (size + 2 * p - reach + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (o - 1) * s >= size + p:  # the last window must start inside the image
            o -= 1
        out.append(o)
    return kernel, stride, padding, dilation, (out[0], out[1])


def check_rprelu(op: str, input: Tensor, **vectors: Tensor) -> None:
    check_real(op, "input", input)
    if input.dim() < 2:
        fail(op, "input", "(N, C, ...)", describe(input))
    check_same_device(op, input, **vectors)
    channels, sizes = input.shape[1], [t.shape for t in vectors.values()]
    # Vectors that agree with each other are a layer's parameters: the input does not fit them.
    agree = all(len(size) == 1 and size == sizes[0] for size in sizes)
    for arg, t in vectors.items():
        if not agree or t.shape[0] == channels:
            check_channel_vector(op, arg, t, channels)
        else:
            check_real(op, arg, t)
            fail(op, "input", f"{t.shape[0]} channels wide for a {arg} of shape {tuple(t.shape)}",
                 f"{channels} channels in {describe(input)}")


def check_shift(op: str, input: Tensor, shift: Tensor, dim: int) -> None:
    """One shift a channel, (C,), or one a channel of each sample: the input's rank, N in dimension
    0, C in `dim`, 1 elsewhere. Where the channels are dimension 0 there are no samples."""
    check_same_device(op, input, shift=shift)
    check_real(op, "shift", shift)
    channels = input.shape[dim]
    if shift.dim() == 1 and shift.shape[0] == channels:
        return
    each = tuple(input.shape[i] if i in (0, dim) else 1 for i in range(input.dim()))
    if dim == 0 or shift.dim() == 1 or tuple(shift.shape) != each:
        takes = f"of shape ({channels},)"
        fail(op, "shift", takes if dim == 0 else f"{takes} or {each}", describe(shift))


def check_rsign(input: Tensor, shift: Tensor) -> None:
    vectors = {"shift": shift} if shift.dim() == 1 else {}
    check_rprelu("rsign", input, **vectors)
    check_shift("rsign", input, shift, 1)


def check_sign_pack(op: str, input: Tensor, shift: Tensor | None, dim: int) -> int:
    check_real(op, "input", input)
    dim = normalize_dim(op, input, dim)
    if input.shape[dim] < 1:
        fail(op, "input", "at least 1 channel wide", describe(input))
    if shift is not None:
        check_shift(op, input, shift, dim)
    return dim


def check_clip(op: str, arg: str, clip: float | None) -> None:
    if clip is not None and not clip >= 0:
        fail(op, arg, "at least 0", f"{clip:g}")


def check_mask_grad(grad: Tensor, mask_words: Tensor, dim: int) -> int:
    op = "mask_grad"
    check_real(op, "grad", grad)
    dim = normalize_dim(op, grad, dim)
    check_same_device(op, grad, mask_words=mask_words)
    check_words(op, "mask_words", mask_words, grad.shape[dim], grad.dim())
    rest = [s for i, s in enumerate(grad.shape) if i != dim]
    if list(mask_words.shape[:-1]) != rest:
        fail(op, "mask_words", f"of shape {(*rest, word_count(grad.shape[dim]))}",
             describe(mask_words))
    return dim


def check_unpack(words: Tensor, channels: int, dtype, dim: int) -> int:
    check_words("unpack", "words", words, channels)
    if dtype not in REAL:
        fail("unpack", "dtype", "float32, float16, bfloat16 or float64", dtype)
    return normalize_dim("unpack", words, dim)


def check_tile_weight(weight_words: Tensor, groups: int) -> None:
    op = "tile_weight"
    if weight_words.dtype != torch.int32 or weight_words.dim() not in (2, 4):
        fail(op, "weight_words", "int32 words of shape (Cout, kh, kw, words) or (Cout, words)",
             describe(weight_words))
    if groups < 1 or weight_words.shape[0] % groups:
        fail(op, "groups", f"a divisor of {weight_words.shape[0]} output channels", groups)


def wants_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's real output is channels-last: as torch, if either operand is."""
    if input.is_contiguous() and weight.is_contiguous():
        return False
    return is_channels_last(input) or is_channels_last(weight)


def is_channels_last(t: Tensor) -> bool:
    return (t.dim() == 4 and not t.is_contiguous()
            and t.is_contiguous(memory_format=torch.channels_last))


def check_grad_like(op: str, grad: Tensor, input: Tensor) -> None:
    check_same_device(op, input, grad=grad)
    if grad.dtype != input.dtype or grad.shape != input.shape:
        fail(op, "grad", describe(input), describe(grad))


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
