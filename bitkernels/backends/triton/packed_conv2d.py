"""packed_conv2d: geometry and outputs of a call, then one contraction."""

from __future__ import annotations

import torch

from bitkernels import reference
from bitkernels._checks import conv_geometry
from bitkernels._ops import empty_real, empty_words
from bitkernels.backends.triton import configs, gemm
from bitkernels.backends.triton.elementwise import takes


def packed_conv2d(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1,
                  *, pad_value=0, out_channels=None, dtype=None, channels_last=True,
                  real=True, packed=False, inner=None, **parts):
    """(real tensor or None, packed signs or None); `inner` forces the inner product."""
    shape, stride, pad, dilation = conv_geometry(
        "packed_conv2d", words, weight_words, channels, stride, padding, dilation, groups,
        pad_value, out_channels)
    if weight_words.dim() == 5:
        weight_words = reference.untile_weight(weight_words, shape[1], groups)
    images, cout, oh, ow = shape
    out = empty_real(words, shape, dtype, channels_last) if real else None
    signs = empty_words(words, (images, oh, ow), cout) if packed else None
    gemm.contract(inner or choose(words, weight_words, shape, groups)[0], words.contiguous(),
                  weight_words.contiguous(), channels, stride, pad, dilation, groups, pad_value,
                  (oh, ow), out, signs, **parts)
    return out, signs


def choose(words, weight_words, shape, groups) -> tuple[str, ...]:
    depth = weight_words.shape[1:4].numel()
    addressable = max(words.numel(), weight_words.numel()) < 2**31
    return gemm.choose(configs.family(words.device), shape[0] * shape[2] * shape[3], shape[1],
                       depth, groups, weight_words.shape[1] * weight_words.shape[2], addressable)


def runs(words, *args, dtype=None, scale=None, bias=None, residual=None, shift_in=None, slope=None,
         shift_out=None, sign_shift=None, **kw) -> bool:
    """Whether the kernels take these types: float64 runs in the reference."""
    return dtype != torch.float64 and takes(scale, bias, residual, shift_in, slope, shift_out,
                                            sign_shift)
