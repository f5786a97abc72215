"""The launchers of the backends in Python: each checks its operator's arguments, then runs it.

A backend is a function `run(operator, *arguments, **keywords)` on checked arguments, with the
signatures of `bitkernels.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from bitkernels import _block_checks, _checks
from bitkernels._ops import LIB, check_conv, check_linear, dot_dtype

Run = Callable[..., object]


def sign_pack(run: Run, input, shift=None, dim=-1):
    return run("sign_pack", input, shift,
               _checks.check_sign_pack("sign_pack", input, shift, dim))


def sign_pack_mask(run: Run, input, clip, shift=None, dim=-1):
    dim = _checks.check_sign_pack("sign_pack_mask", input, shift, dim)
    _checks.check_clip("sign_pack_mask", "clip", clip)
    return run("sign_pack_mask", input, clip, shift, dim)


def mask_grad(run: Run, grad, mask_words, dim=-1):
    return run("mask_grad", grad, mask_words, _checks.check_mask_grad(grad, mask_words, dim))


def unpack(run: Run, words, channels, dtype=torch.float32, dim=-1):
    return run("unpack", words, channels, dtype, _checks.check_unpack(words, channels, dtype, dim))


def packed_conv2d(run: Run, real: bool, packed: bool, *args, **kw):
    check_conv(*args, **kw)
    return run("packed_conv2d", *args, real=real, packed=packed, **kw)


def packed_linear(run: Run, real: bool, packed: bool, *args, **kw):
    check_linear(*args, **kw)
    return run("packed_linear", *args, real=real, packed=packed, **kw)


def packed_max_pool2d(run: Run, words, kernel_size, stride=(), padding=(0,), dilation=(1,),
                      ceil_mode=False):
    _checks.pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode)
    return run("packed_max_pool2d", words, kernel_size, stride, padding, dilation, ceil_mode)


def rsign(run: Run, input, shift, *, estimator="approx_sign", clip=1.0, beta=5.0):
    _checks.check_rsign(input, shift)
    _checks.check_estimator("rsign", "estimator", estimator)
    _checks.check_clip("rsign", "clip", clip)
    return run("rsign", input, shift)


def rprelu(run: Run, input, shift_in, slope, shift_out):
    _checks.check_rprelu("rprelu", input, shift_in=shift_in, slope=slope, shift_out=shift_out)
    return run("rprelu", input, shift_in, slope, shift_out)


def rprelu_backward(run: Run, grad, input, shift_in, slope):
    _checks.check_rprelu("rprelu_backward", input, shift_in=shift_in, slope=slope)
    _checks.check_grad_like("rprelu_backward", grad, input)
    return run("rprelu_backward", grad, input, shift_in, slope)


def packed_conv2d_moments(run: Run, words, weight_words, channels, stride=(1,), padding=(0,),
                          dilation=(1,), groups=1, *, pad_value=0, out_channels=None, relu=False):
    check_conv(words, weight_words, channels, stride, padding, dilation, groups,
               pad_value=pad_value, out_channels=out_channels)
    return run("packed_conv2d_moments", words, weight_words, channels, stride, padding, dilation,
               groups, pad_value=pad_value, out_channels=out_channels, relu=relu,
               dtype=dot_dtype(weight_words, channels, groups))


def residual_block_forward(run: Run, *args):
    _block_checks.check_block_forward(*args[:-1])
    return run("residual_block_forward", *args)


def residual_block_backward(run: Run, *args):
    _block_checks.check_block_backward(*args[:-1])
    return run("residual_block_backward", *args)


def residual_block_norm_backward(run: Run, grad, dot, p, q, r, center, relu, dtype):
    _block_checks.check_norm_backward(grad, dot, p, q, r, center, dtype)
    return run("residual_block_norm_backward", grad, dot, p, q, r, center, relu, dtype)


def packed_conv2d_weight_grad(run: Run, grad, words, channels, kernel_size, stride=(1,),
                              padding=(0,), dilation=(1,), pad_value=0):
    geometry = _block_checks.check_weight_grad(grad, words, channels, kernel_size, stride, padding,
                                               dilation, pad_value)
    return run("packed_conv2d_weight_grad", grad, words, channels, *geometry, pad_value)


def packed_conv2d_input_grad(run: Run, grad, weight_words, channels, scale, input_size,
                             padding=(0,), dilation=(1,)):
    return run("packed_conv2d_input_grad", grad, weight_words, channels, scale,
               *_block_checks.check_input_grad(grad, weight_words, channels, scale, input_size,
                                               padding, dilation))


def sign_backward(run: Run, grad, input, shift=None, add=None, *, estimator="ste_sign", clip=1.0,
                  beta=5.0):
    _block_checks.check_sign_backward(grad, input, shift, add, estimator, clip)
    return run("sign_backward", grad, input, shift, add, estimator, clip, beta)


SINGLE = (sign_pack, sign_pack_mask, mask_grad, unpack, packed_max_pool2d, rsign, rprelu,
          rprelu_backward)
BLOCK = (packed_conv2d_moments, residual_block_forward, residual_block_backward,
         residual_block_norm_backward, sign_backward, packed_conv2d_weight_grad,
         packed_conv2d_input_grad)


def register_block(key: str, run: Run, launchers: Sequence[Run] = BLOCK) -> None:
    """Makes `run` the kernel of the residual block's parts under a dispatch key."""
    for launcher in launchers:
        LIB.impl(launcher.__name__, functools.partial(launcher, run), key)


def register(key: str, run: Run) -> None:
    """Makes `run` the kernel of every packed operator and activation under a dispatch key."""
    for launcher in SINGLE:
        LIB.impl(launcher.__name__, functools.partial(launcher, run), key)
    for name, fn in (("packed_conv2d", packed_conv2d), ("packed_linear", packed_linear)):
        LIB.impl(f"{name}.both", functools.partial(fn, run, True, True), key)
        LIB.impl(name, lambda *a, fn=fn, **k: fn(run, True, False, *a, **k)[0], key)
        LIB.impl(f"{name}.packed", lambda *a, fn=fn, **k: fn(run, False, True, *a, **k)[1], key)
