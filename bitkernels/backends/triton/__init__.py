"""Registers the Triton kernels for CUDA and HIP tensors.

Importing registers small launchers and nothing else: Triton, the kernels and the GPU are touched at
the first call of an operator. Each launcher checks its arguments and leaves the rest to `run`.
"""

from __future__ import annotations

import functools

import torch

from bitkernels import _checks
from bitkernels._ops import LIB, check_conv, check_linear
from bitkernels.backends.triton.dispatch import run


def _register(name: str):
    def decorate(fn):
        LIB.impl(name, fn, "CUDA")
        return fn

    return decorate


@_register("sign_pack")
def sign_pack(input, shift=None, dim=-1):
    return run("sign_pack", input, shift,
               _checks.check_sign_pack("sign_pack", input, shift, dim))


@_register("sign_pack_mask")
def sign_pack_mask(input, clip, shift=None, dim=-1):
    dim = _checks.check_sign_pack("sign_pack_mask", input, shift, dim)
    _checks.check_clip("sign_pack_mask", "clip", clip)
    return run("sign_pack_mask", input, clip, shift, dim)


@_register("mask_grad")
def mask_grad(grad, mask_words, dim=-1):
    return run("mask_grad", grad, mask_words, _checks.check_mask_grad(grad, mask_words, dim))


@_register("unpack")
def unpack(words, channels, dtype=torch.float32, dim=-1):
    return run("unpack", words, channels, dtype, _checks.check_unpack(words, channels, dtype, dim))


def _packed_conv2d(real, packed, *args, **kw):
    check_conv(*args, **kw)
    return run("packed_conv2d", *args, real=real, packed=packed, **kw)


def _packed_linear(real, packed, *args, **kw):
    check_linear(*args, **kw)
    return run("packed_linear", *args, real=real, packed=packed, **kw)


for _name, _fn in (("packed_conv2d", _packed_conv2d), ("packed_linear", _packed_linear)):
    LIB.impl(f"{_name}.both", functools.partial(_fn, True, True), "CUDA")
    LIB.impl(_name, lambda *a, fn=_fn, **k: fn(True, False, *a, **k)[0], "CUDA")
    LIB.impl(f"{_name}.packed", lambda *a, fn=_fn, **k: fn(False, True, *a, **k)[1], "CUDA")


@_register("packed_max_pool2d")
def packed_max_pool2d(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    _checks.pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode)
    return run("packed_max_pool2d", words, kernel_size, stride, padding, dilation, ceil_mode)


@_register("rsign")
def rsign(input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    _checks.check_rprelu("rsign", input, shift=shift)
    _checks.check_estimator("rsign", "estimator", estimator)
    return run("rsign", input, shift)


@_register("rprelu")
def rprelu(input, shift_in, slope, shift_out):
    _checks.check_rprelu("rprelu", input, shift_in=shift_in, slope=slope, shift_out=shift_out)
    return run("rprelu", input, shift_in, slope, shift_out)


@_register("rprelu_backward")
def rprelu_backward(grad, input, shift_in, slope):
    _checks.check_rprelu("rprelu_backward", input, shift_in=shift_in, slope=slope)
    return run("rprelu_backward", grad, input, shift_in, slope)
