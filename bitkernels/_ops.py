"""Schemas and fake kernels of every operator: the one contract that all backends share.

Each operator is declared once here. Its checks (`_checks.py`) run in the fake kernel (compile,
export, meta) and before the reference implementation.

Conventions (see docs/architecture.md for the numeric contract):
  words     32 signs in an int32, least significant bit first, along the channels, channels last.
            Bit 1 is +1, and x is +1 unless x < 0; bits past the last channel are 0.
  channels  the number of real channels behind the words, since words alone cannot tell.
  shift     of rsign, sign_pack and sign_pack_mask: one a channel, (C,), or one a channel of each
            sample: of the input's rank, N in dimension 0, C in the channels' and 1 elsewhere.
  filter    words of shape (Cout, kh, kw, ceil(Cin/groups/32)), or the same tiled by `tile_weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._block_checks import (
    check_binary_residual_block,
    check_block_backward,
    check_block_forward,
    check_input_grad,
    check_norm_backward,
    check_sign_backward,
    check_weight_grad,
)
from bitkernels._checks import (
    TILE,
    check_binary_conv2d,
    check_binary_linear,
    check_clip,
    check_epilogue,
    check_estimator,
    check_grad_like,
    check_mask_grad,
    check_rprelu,
    check_rsign,
    check_sign_pack,
    check_tile_weight,
    check_unpack,
    conv_geometry,
    empty_around,
    linear_geometry,
    pool_geometry,
    wants_channels_last,
    word_count,
)
from bitkernels._transposed import (
    check_binary_conv_transpose2d,
    check_packed_conv_transpose2d,
)

LIB = torch.library.Library("bitkernels", "DEF")

_EPILOGUE = (
    "float? clamp_min=None, float? clamp_max=None, Tensor? scale=None, Tensor? bias=None, "
    "Tensor? residual=None, Tensor? shift_in=None, Tensor? slope=None, Tensor? shift_out=None"
)
_CONV = (
    "Tensor words, Tensor weight_words, SymInt channels, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, int groups=1, *, int pad_value=0, SymInt? out_channels=None, "
    + _EPILOGUE
)
_LINEAR = (
    "Tensor words, Tensor weight_words, SymInt channels, *, SymInt? out_channels=None, " + _EPILOGUE
)
_GEOMETRY = (
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, *, int pad_value=0"
)
_REAL_OUT = "ScalarType? dtype=None"
_PACKED_OUT = "Tensor? sign_shift=None"
_TRAIN = (
    "Tensor? scale=None, str input_estimator='ste_sign', float? input_clip=1.0, "
    "str weight_estimator='ste_sign', float? weight_clip=1.0, float beta=5.0, "
    "bool scale_weight_grad=True, ScalarType? dtype=None"
)

SCHEMAS = (
    "sign_pack(Tensor input, Tensor? shift=None, int dim=-1) -> Tensor",
    "sign_pack_mask(Tensor input, float clip, Tensor? shift=None, int dim=-1) -> (Tensor, Tensor)",
    "mask_grad(Tensor grad, Tensor mask_words, int dim=-1) -> Tensor",
    "unpack(Tensor words, SymInt channels, ScalarType dtype=float32, int dim=-1) -> Tensor",
    "tile_weight(Tensor weight_words, int groups=1) -> Tensor",
    f"packed_conv2d({_CONV}, {_REAL_OUT}, bool channels_last=True) -> Tensor",
    f"packed_conv2d.packed({_CONV}, {_PACKED_OUT}, Tensor? threshold=None) -> Tensor",
    f"packed_conv2d.both({_CONV}, {_REAL_OUT}, bool channels_last=True, {_PACKED_OUT})"
    " -> (Tensor, Tensor)",
    f"packed_linear({_LINEAR}, {_REAL_OUT}) -> Tensor",
    f"packed_linear.packed({_LINEAR}, {_PACKED_OUT}, Tensor? threshold=None) -> Tensor",
    f"packed_linear.both({_LINEAR}, {_REAL_OUT}, {_PACKED_OUT}) -> (Tensor, Tensor)",
    # Filters by output channel, as of packed_conv2d; never tiled.
    "packed_conv_transpose2d(Tensor words, Tensor weight_words, SymInt channels, int[2] stride=1, "
    "int[2] padding=0, int[2] output_padding=0, int groups=1, int[2] dilation=1, *, "
    f"Tensor? scale=None, Tensor? bias=None, {_REAL_OUT}, bool channels_last=True) -> Tensor",
    # What binary_conv2d runs: the output, and the packed signs and mask that its backward keeps.
    "binary_conv2d_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, int[] stride, "
    "int[] padding, int[] dilation, int groups, int pad_value, float? clip, ScalarType dtype, "
    "bool channels_last) -> (Tensor, Tensor, Tensor)",
    "packed_max_pool2d(Tensor words, int[2] kernel_size, int[2] stride=[], "
    "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> Tensor",
    "rsign(Tensor input, Tensor shift, *, str estimator='approx_sign', float? clip=1.0, "
    "float beta=5.0) -> Tensor",
    "rprelu(Tensor input, Tensor shift_in, Tensor slope, Tensor shift_out) -> Tensor",
    "rprelu_backward(Tensor grad, Tensor input, Tensor shift_in, Tensor slope)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "binary_conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, int groups=1, *, int pad_value=0, "
    f"{_TRAIN}) -> Tensor",
    "binary_conv2d.padding(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
    "str padding='valid', int[2] dilation=1, int groups=1, *, int pad_value=0, "
    f"{_TRAIN}) -> Tensor",
    # The arguments in the order of torch.nn.functional.conv_transpose2d.
    "binary_conv_transpose2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] output_padding=0, int groups=1, int[2] dilation=1, *, "
    f"{_TRAIN}) -> Tensor",
    f"binary_linear(Tensor input, Tensor weight, Tensor? bias=None, *, {_TRAIN}) -> Tensor",
    # A residual block in training. It returns the activation, and the mean and unbiased variance
    # that the normalization's running statistics are made of.
    "binary_residual_block(Tensor input, Tensor weight, Tensor? residual=None, "
    "Tensor? sign_shift=None, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, Tensor? shift_in=None, Tensor? slope=None, "
    f"Tensor? shift_out=None, {_GEOMETRY}, bool relu=False, float eps=1e-05, str? group=None, "
    f"{_TRAIN}) -> (Tensor, Tensor, Tensor)",
    # Its parts: dot products in the smallest of int16 and int32, with their sums, sums of squares
    # (of max(dot, 0) with relu) and count; what follows the convolution; and the backward of it.
    "packed_conv2d_moments(Tensor words, Tensor weight_words, SymInt channels, "
    f"{_GEOMETRY}, SymInt? out_channels=None, bool relu=False) -> (Tensor, Tensor)",
    "residual_block_forward(Tensor dot, Tensor residual, Tensor scale, Tensor bias, "
    "Tensor? shift_in, Tensor? slope, Tensor? shift_out, bool relu) -> Tensor",
    "residual_block_backward(Tensor grad, Tensor dot, Tensor? residual, Tensor scale, Tensor bias, "
    "Tensor? shift_in, Tensor? slope, Tensor center, bool relu) -> (Tensor, Tensor)",
    "residual_block_norm_backward(Tensor grad, Tensor dot, Tensor p, Tensor q, Tensor r, "
    "Tensor center, bool relu, ScalarType dtype) -> Tensor",
    # Real gradients of a convolution from bits: of the input, at stride 1, in grad's dtype; of the
    # weight's signs, float32.
    "packed_conv2d_input_grad(Tensor grad, Tensor weight_words, SymInt channels, Tensor? scale, "
    "SymInt[2] input_size, int[2] padding=0, int[2] dilation=1) -> Tensor",
    "packed_conv2d_weight_grad(Tensor grad, Tensor words, SymInt channels, int[2] kernel_size, "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int pad_value=0) -> Tensor",
    "sign_backward(Tensor grad, Tensor input, Tensor? shift=None, Tensor? add=None, *, "
    "str estimator='ste_sign', float? clip=1.0, float beta=5.0) -> (Tensor, Tensor)",
)
for _schema in SCHEMAS:
    LIB.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def empty_real(like: Tensor, shape, dtype, channels_last: bool) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or torch.float32, device=like.device,
                       memory_format=format)


def empty_words(like: Tensor, shape, channels: int) -> Tensor:
    return like.new_empty((*shape, word_count(channels)), dtype=torch.int32)


def _fake(name: str):
    return torch.library.register_fake(f"bitkernels::{name}", lib=LIB)


@_fake("sign_pack")
def _(input, shift=None, dim=-1):
    dim = check_sign_pack("sign_pack", input, shift, dim)
    rest = [s for i, s in enumerate(input.shape) if i != dim]
    return empty_words(input, rest, input.shape[dim])


@_fake("sign_pack_mask")
def _(input, clip, shift=None, dim=-1):
    dim = check_sign_pack("sign_pack_mask", input, shift, dim)
    check_clip("sign_pack_mask", "clip", clip)
    rest = [s for i, s in enumerate(input.shape) if i != dim]
    return empty_words(input, rest, input.shape[dim]), empty_words(input, rest, input.shape[dim])


@_fake("mask_grad")
def _(grad, mask_words, dim=-1):
    return empty_around(grad, check_mask_grad(grad, mask_words, dim))


@_fake("unpack")
def _(words, channels, dtype=torch.float32, dim=-1):
    dim = check_unpack(words, channels, dtype, dim)
    return words.new_empty((*words.shape[:-1], channels), dtype=dtype).movedim(-1, dim)


@_fake("tile_weight")
def _(weight_words, groups=1):
    check_tile_weight(weight_words, groups)
    tiles = groups * ((weight_words.shape[0] // groups + TILE - 1) // TILE)
    return weight_words.new_empty((tiles, *weight_words.shape[1:], TILE))


def check_conv(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1, *,
               pad_value=0, out_channels=None, channels_last=True, **epilogue):
    """Output shape (N, Cout, OH, OW) of a packed_conv2d call, its arguments checked."""
    op = "packed_conv2d"
    shape, *_ = conv_geometry(op, words, weight_words, channels, stride, padding, dilation, groups,
                              pad_value, out_channels)
    check_epilogue(op, words, shape, shape[1], **epilogue)
    return shape


def check_linear(words, weight_words, channels, *, out_channels=None, **epilogue):
    """Output shape (..., out) of a packed_linear call, its arguments checked."""
    shape = linear_geometry("packed_linear", words, weight_words, channels, out_channels)
    check_epilogue("packed_linear", words, shape, shape[-1], **epilogue)
    return shape


@_fake("packed_conv2d")
def _(words, *args, dtype=None, channels_last=True, **kw):
    return empty_real(words, check_conv(words, *args, dtype=dtype, **kw), dtype, channels_last)


@_fake("packed_conv2d.packed")
def _(words, *args, **kw):
    n, cout, oh, ow = check_conv(words, *args, **kw)
    return empty_words(words, (n, oh, ow), cout)


@_fake("packed_conv2d.both")
def _(words, *args, dtype=None, channels_last=True, **kw):
    n, cout, oh, ow = shape = check_conv(words, *args, dtype=dtype, **kw)
    return empty_real(words, shape, dtype, channels_last), empty_words(words, (n, oh, ow), cout)


@_fake("packed_linear")
def _(words, *args, dtype=None, **kw):
    return empty_real(words, check_linear(words, *args, dtype=dtype, **kw), dtype, False)


@_fake("packed_linear.packed")
def _(words, *args, **kw):
    *rest, cout = check_linear(words, *args, **kw)
    return empty_words(words, rest, cout)


@_fake("packed_linear.both")
def _(words, *args, dtype=None, **kw):
    *rest, cout = shape = check_linear(words, *args, dtype=dtype, **kw)
    return empty_real(words, shape, dtype, False), empty_words(words, rest, cout)


@_fake("packed_conv_transpose2d")
def _(words, weight_words, channels, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
      dilation=(1,), *, scale=None, bias=None, dtype=None, channels_last=True):
    shape, *_ = check_packed_conv_transpose2d(
        words, weight_words, channels, stride, padding, output_padding, groups, dilation,
        scale=scale, bias=bias, dtype=dtype)
    return empty_real(words, shape, dtype, channels_last)


@_fake("packed_max_pool2d")
def _(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    *_, (oh, ow) = pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode)
    return words.new_empty((words.shape[0], oh, ow, words.shape[3]))


@_fake("rsign")
def _(input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    check_rsign(input, shift)
    check_estimator("rsign", "estimator", estimator)
    check_clip("rsign", "clip", clip)
    return empty_around(input, 1)


@_fake("rprelu")
def _(input, shift_in, slope, shift_out):
    check_rprelu("rprelu", input, shift_in=shift_in, slope=slope, shift_out=shift_out)
    return empty_around(input, 1)


@_fake("rprelu_backward")
def _(grad, input, shift_in, slope):
    check_rprelu("rprelu_backward", input, shift_in=shift_in, slope=slope)
    check_grad_like("rprelu_backward", grad, input)
    vector = input.new_empty((input.shape[1],), dtype=torch.float32)
    return empty_around(input, 1), vector, torch.empty_like(vector), torch.empty_like(vector)


def _conv_train_fake(input, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1,
                     *, pad_value=0, scale=None, input_estimator="ste_sign", input_clip=1.0,
                     weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True,
                     dtype=None):
    shape, *_ = check_binary_conv2d(
        input, weight, bias, stride, padding, dilation, groups, pad_value=pad_value, scale=scale,
        input_estimator=input_estimator, input_clip=input_clip, weight_estimator=weight_estimator,
        weight_clip=weight_clip, dtype=dtype)
    batched = shape if len(shape) == 4 else (1, *shape)
    out = empty_real(input, batched, dtype or input.dtype, wants_channels_last(input, weight))
    return out if len(shape) == 4 else out.squeeze(0)


_fake("binary_conv2d")(_conv_train_fake)


@_fake("binary_conv2d_forward")
def _(input, weight, bias, scale, stride, padding, dilation, groups, pad_value, clip, dtype,
      channels_last):
    shape, *_ = check_binary_conv2d(
        input, weight, bias, stride, padding, dilation, groups, pad_value=pad_value, scale=scale,
        input_estimator="ste_sign", input_clip=clip, weight_estimator="ste_sign", weight_clip=None,
        dtype=dtype)
    words = empty_words(input, (shape[0], *input.shape[2:]), input.shape[1])
    mask = input.new_empty(0, dtype=torch.int32) if clip is None else torch.empty_like(words)
    return empty_real(input, shape, dtype, channels_last), words, mask


@_fake("binary_conv2d.padding")
def _(input, weight, bias=None, stride=(1,), padding="valid", *args, **kw):
    return _conv_train_fake(input, weight, bias, stride, padding, *args, **kw)


@_fake("binary_conv_transpose2d")
def _(input, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
      dilation=(1,), *, scale=None, input_estimator="ste_sign", input_clip=1.0,
      weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True, dtype=None):
    shape, *_ = check_binary_conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation, scale=scale,
        input_estimator=input_estimator, input_clip=input_clip, weight_estimator=weight_estimator,
        weight_clip=weight_clip, dtype=dtype)
    batched = shape if len(shape) == 4 else (1, *shape)
    out = empty_real(input, batched, dtype or input.dtype, wants_channels_last(input, weight))
    return out if len(shape) == 4 else out.squeeze(0)


@_fake("binary_linear")
def _(input, weight, bias=None, *, scale=None, input_estimator="ste_sign", input_clip=1.0,
      weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True, dtype=None):
    shape = check_binary_linear(
        input, weight, bias, scale=scale, input_estimator=input_estimator, input_clip=input_clip,
        weight_estimator=weight_estimator, weight_clip=weight_clip, dtype=dtype)
    return empty_real(input, shape, dtype or input.dtype, False)


@_fake("binary_residual_block")
def _(input, *args, **kw):
    shape, *_ = check_binary_residual_block(input, *args, **kw)
    vector = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (empty_real(input, shape, input.dtype, True),
            *(input.new_empty(shape[1], dtype=vector) for _ in range(2)))


@_fake("packed_conv2d_moments")
def _(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1, *,
      pad_value=0, out_channels=None, relu=False):
    shape = check_conv(words, weight_words, channels, stride, padding, dilation, groups,
                       pad_value=pad_value, out_channels=out_channels)
    dtype = dot_dtype(weight_words, channels, groups)
    return (empty_real(words, shape, dtype, True),
            words.new_empty((3, shape[1]), dtype=torch.int64))


def dot_dtype(weight_words: Tensor, channels: int, groups: int) -> torch.dtype:
    """int16 where every dot product fits, else int32."""
    products = weight_words.shape[1] * weight_words.shape[2] * (channels // groups)
    return torch.int16 if products < 2**15 else torch.int32


@_fake("residual_block_forward")
def _(dot, residual, scale, bias, shift_in, slope, shift_out, relu):
    check_block_forward(dot, residual, scale, bias, shift_in, slope, shift_out)
    return empty_real(dot, dot.shape, residual.dtype, True)


@_fake("residual_block_backward")
def _(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    check_block_backward(grad, dot, residual, scale, bias, shift_in, slope, center)
    sums = dot.new_empty((4, dot.shape[1]), dtype=torch.float64)
    if slope is None:
        return grad.new_empty(0), sums
    return empty_real(dot, dot.shape, grad.dtype, True), sums


@_fake("residual_block_norm_backward")
def _(grad, dot, p, q, r, center, relu, dtype):
    check_norm_backward(grad, dot, p, q, r, center, dtype)
    return empty_real(dot, dot.shape, dtype, True)


@_fake("sign_backward")
def _(grad, input, shift=None, add=None, *, estimator="ste_sign", clip=1.0, beta=5.0):
    check_sign_backward(grad, input, shift, add, estimator, clip)
    return empty_around(input, 1), input.new_empty(input.shape[1], dtype=torch.float64)


@_fake("packed_conv2d_weight_grad")
def _(grad, words, channels, kernel_size, stride=(1,), padding=(0,), dilation=(1,), pad_value=0):
    kernel, *_ = check_weight_grad(grad, words, channels, kernel_size, stride, padding, dilation,
                                   pad_value)
    return empty_real(grad, (grad.shape[1], channels, *kernel), torch.float32, True)


@_fake("packed_conv2d_input_grad")
def _(grad, weight_words, channels, scale, input_size, padding=(0,), dilation=(1,)):
    check_input_grad(grad, weight_words, channels, scale, input_size, padding, dilation)
    return empty_real(grad, (grad.shape[0], channels, *input_size), grad.dtype, True)
