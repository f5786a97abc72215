"""Registers the reference implementation for every device that has nothing faster.

Runs the checks of `_checks.py`, then `reference.py`.
"""

from __future__ import annotations

import functools

import torch

from bitkernels import _checks, reference
from bitkernels._ops import LIB, check_conv, check_linear


def _register(name: str):
    def decorate(fn):
        LIB.impl(name, fn, "CompositeExplicitAutograd")
        return fn

    return decorate


@_register("sign_pack")
def sign_pack(input, shift=None, dim=-1):
    return reference.sign_pack(
        input, shift, _checks.check_sign_pack("sign_pack", input, shift, dim))


@_register("sign_pack_mask")
def sign_pack_mask(input, clip, shift=None, dim=-1):
    dim = _checks.check_sign_pack("sign_pack_mask", input, shift, dim)
    _checks.check_clip("sign_pack_mask", "clip", clip)
    return reference.sign_pack_mask(input, clip, shift, dim)


@_register("mask_grad")
def mask_grad(grad, mask_words, dim=-1):
    dim = _checks.check_mask_grad(grad, mask_words, dim)
    return _checks.empty_around(grad, dim).copy_(reference.mask_grad(grad, mask_words, dim))


@_register("unpack")
def unpack(words, channels, dtype=torch.float32, dim=-1):
    return reference.unpack(
        words, channels, dtype, _checks.check_unpack(words, channels, dtype, dim))


@_register("tile_weight")
def tile_weight(weight_words, groups=1):
    _checks.check_tile_weight(weight_words, groups)
    return reference.tile_weight(weight_words, groups)


def _packed_conv2d(real, packed, *args, **kw):
    check_conv(*args, **kw)
    return reference.packed_conv2d(*args, real=real, packed=packed, **kw)


def _packed_linear(real, packed, *args, **kw):
    check_linear(*args, **kw)
    return reference.packed_linear(*args, real=real, packed=packed, **kw)


for _name, _fn in (("packed_conv2d", _packed_conv2d), ("packed_linear", _packed_linear)):
    _both = functools.partial(_fn, True, True)
    LIB.impl(f"{_name}.both", _both, "CompositeExplicitAutograd")
    LIB.impl(_name, lambda *a, fn=_fn, **k: fn(True, False, *a, **k)[0],
             "CompositeExplicitAutograd")
    LIB.impl(f"{_name}.packed", lambda *a, fn=_fn, **k: fn(False, True, *a, **k)[1],
             "CompositeExplicitAutograd")


@_register("binary_conv2d_forward")
def binary_conv2d_forward(input, weight, bias, scale, stride, padding, dilation, groups, pad_value,
                          clip, dtype, channels_last):
    """By the packed operators, whatever backend they have on the device."""
    ops = torch.ops.bitkernels
    if clip is None:
        words, mask = ops.sign_pack(input, None, 1), input.new_empty(0, dtype=torch.int32)
    else:
        words, mask = ops.sign_pack_mask(input, clip, None, 1)
    out = ops.packed_conv2d(
        words, ops.sign_pack(weight, None, 1), input.shape[1], stride, padding, dilation, groups,
        pad_value=pad_value, scale=scale, bias=bias, dtype=dtype, channels_last=channels_last)
    return out, words, mask


@_register("packed_max_pool2d")
def packed_max_pool2d(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    _checks.pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode)
    return reference.packed_max_pool2d(words, kernel_size, stride, padding, dilation, ceil_mode)


@_register("rprelu_backward")
def rprelu_backward(grad, input, shift_in, slope):
    _checks.check_rprelu("rprelu_backward", input, shift_in=shift_in, slope=slope)
    _checks.check_grad_like("rprelu_backward", grad, input)
    grad_input, *sums = reference.rprelu_backward(grad, input, shift_in, slope)
    return _checks.empty_around(input, 1).copy_(grad_input), *sums


@_register("rsign")
def rsign(input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    _checks.check_rprelu("rsign", input, shift=shift)
    _checks.check_estimator("rsign", "estimator", estimator)
    _checks.check_clip("rsign", "clip", clip)
    return _checks.empty_around(input, 1).copy_(reference.rsign(input, shift))


@_register("rprelu")
def rprelu(input, shift_in, slope, shift_out):
    _checks.check_rprelu("rprelu", input, shift_in=shift_in, slope=slope, shift_out=shift_out)
    out = reference.rprelu(input, shift_in, slope, shift_out)
    return _checks.empty_around(input, 1).copy_(out)
