"""Argument checks of the residual block and its parts, as `_checks.py` for the other operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._checks import (
    REAL,
    check_binary_conv2d,
    check_channel_vector,
    check_clip,
    check_real,
    check_same_device,
    check_words,
    conv_output_size,
    describe,
    fail,
    padding4,
    pair,
)


def _check_dot(op: str, dot: Tensor) -> None:
    if dot.dtype not in (torch.int16, torch.int32) or dot.dim() != 4:
        fail(op, "dot", "int16 or int32 of shape (N, C, H, W)", describe(dot))


def _check_like_dot(op: str, arg: str, t: Tensor, dot: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype or t.shape != dot.shape:
        fail(op, arg, f"{str(dtype)[6:]} of shape {tuple(dot.shape)}", describe(t))


def _check_vectors(op: str, like: Tensor, channels: int, **vectors: Tensor | None) -> None:
    check_same_device(op, like, **vectors)
    for arg, t in vectors.items():
        check_channel_vector(op, arg, t, channels)


def check_block_forward(dot, residual, scale, bias, shift_in, slope, shift_out) -> None:
    op = "residual_block_forward"
    check_real(op, "residual", residual)
    _check_dot(op, dot)
    _check_like_dot(op, "residual", residual, dot, residual.dtype)
    check_same_device(op, dot, residual=residual)
    _check_vectors(op, dot, dot.shape[1], scale=scale, bias=bias, shift_in=shift_in, slope=slope,
                   shift_out=shift_out)


def check_block_backward(grad, dot, residual, scale, bias, shift_in, slope, center) -> None:
    op = "residual_block_backward"
    check_real(op, "grad", grad)
    _check_dot(op, dot)
    _check_like_dot(op, "grad", grad, dot, grad.dtype)
    check_same_device(op, dot, grad=grad, residual=residual)
    _check_vectors(op, dot, dot.shape[1], scale=scale, bias=bias, shift_in=shift_in, slope=slope,
                   center=center)
    if slope is not None:
        if residual is None:
            fail(op, "residual", "given with slope", "None")
        _check_like_dot(op, "residual", residual, dot, grad.dtype)


def check_norm_backward(grad, dot, p, q, r, center, dtype) -> None:
    op = "residual_block_norm_backward"
    check_real(op, "grad", grad)
    if dtype not in REAL or (dtype == torch.float64) != (grad.dtype == torch.float64):
        fail(op, "dtype", "a real type, float64 for float64 only", dtype)
    _check_dot(op, dot)
    _check_like_dot(op, "grad", grad, dot, grad.dtype)
    check_same_device(op, dot, grad=grad)
    _check_vectors(op, dot, dot.shape[1], p=p, q=q, r=r, center=center)


def check_sign_backward(grad, input, shift, add, estimator, clip) -> None:
    op = "sign_backward"
    check_real(op, "input", input)
    check_real(op, "grad", grad)
    if input.dim() < 2:
        fail(op, "input", "(N, C, ...)", describe(input))
    _check_vectors(op, input, input.shape[1], shift=shift)
    check_clip(op, "clip", clip)
    if estimator not in ("ste_sign", "approx_sign", "swish_sign", "identity"):
        fail(op, "estimator", "one of ste_sign, approx_sign, swish_sign, identity",
             repr(estimator))
    check_same_device(op, input, grad=grad, add=add)
    wide = torch.float64
    if grad.shape != input.shape or (grad.dtype == wide) != (input.dtype == wide):
        fail(op, "grad", describe(input), describe(grad))
    if add is not None and (add.shape != input.shape or add.dtype != input.dtype):
        fail(op, "add", describe(input), describe(add))


def check_weight_grad(grad, words, channels, kernel_size, stride, padding, dilation, pad_value):
    """Checked (kernel_size, stride, (top, bottom, left, right), dilation)."""
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
    return kernel, stride, pad, dilation


def check_input_grad(grad, weight_words, channels, scale, input_size, padding, dilation):
    """Checked (input_size, (top, bottom, left, right), dilation)."""
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
    return input_size, pad, dilation


def check_binary_residual_block(
        input, weight, residual=None, sign_shift=None, norm_weight=None, norm_bias=None,
        shift_in=None, slope=None, shift_out=None, stride=(1,), padding=(0,), dilation=(1,),
        groups=1, *, pad_value=0, relu=False, eps=1e-5, group=None, scale=None,
        input_estimator="ste_sign", input_clip=1.0, weight_estimator="ste_sign",
        weight_clip=1.0, beta=5.0, scale_weight_grad=True, dtype=None):
    """Checked ((N, Cout, OH, OW), stride, (top, bottom, left, right), dilation)."""
    op = "binary_residual_block"
    check_real(op, "input", input, 4)
    shape, stride, pad, dilation = check_binary_conv2d(
        input, weight, None, stride, padding, dilation, groups, pad_value=pad_value, scale=scale,
        input_estimator=input_estimator, input_clip=input_clip, weight_estimator=weight_estimator,
        weight_clip=weight_clip, dtype=dtype, op=op)
    check_same_device(op, input, residual=residual)
    stream = input if residual is None else residual
    if stream.shape != shape or stream.dtype != input.dtype:
        fail(op, "residual", f"{str(input.dtype)[6:]} of shape {tuple(shape)}", describe(stream))
    if group is None and shape[0] * shape[2] * shape[3] < 2:
        fail(op, "input", "of more than 1 value per channel in the output", describe(input))
    _check_vectors(op, input, shape[1], norm_weight=norm_weight, norm_bias=norm_bias,
                   shift_in=shift_in, slope=slope, shift_out=shift_out)
    _check_vectors(op, input, input.shape[1], sign_shift=sign_shift)
    if slope is None and (shift_in is not None or shift_out is not None):
        fail(op, "slope", "given with shift_in or shift_out", "None")
    if not eps >= 0:
        fail(op, "eps", "at least 0", f"{eps:g}")
    if dtype is not None and (dtype == torch.float64) != (input.dtype == torch.float64):
        fail(op, "dtype", "a real type, float64 for float64 only", dtype)
    return shape, stride, pad, dilation
