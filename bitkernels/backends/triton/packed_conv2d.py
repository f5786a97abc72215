"""packed_conv2d: geometry and outputs of a call, then one contraction."""

from __future__ import annotations

import torch

from bitkernels import reference
from bitkernels.backends.triton import configs, gemm
from bitkernels.ops.geometry import conv_geometry, empty_real, empty_words


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
    inner = inner or _fitting(words, weight_words, channels, shape, groups)[0]
    gemm.contract(inner, words.contiguous(), weight_words.contiguous(), channels,
                  stride, pad, dilation, groups, pad_value, (oh, ow), out, signs, **parts)
    return out, signs


def _fitting(words, weight_words, channels, shape, groups) -> tuple[str, ...]:
    shape = torch.Size(shape)
    kh, kw, depth = weight_words.shape[1:4]
    addressable = max(4 * words.numel(), 4 * weight_words.numel(), shape.numel()) < 2**31
    whole = groups == 1 or (channels // groups % 32 == 0
                            and shape[1] // groups % configs.COLUMNS == 0)
    return gemm.choose(configs.family(words.device), shape[0] * shape[2] * shape[3], shape[1],
                       kh * kw * depth, whole, kh * kw, addressable)


def inner_products(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,),
                   groups=1, *, pad_value=0, out_channels=None, **kw) -> tuple[str, ...]:
    """Those which take this call, the preferred first; none where float64 is involved."""
    if not gemm.takes(**kw):
        return ()
    shape, *_ = conv_geometry("packed_conv2d", words, weight_words, channels, stride, padding,
                              dilation, groups, pad_value, out_channels)
    return _fitting(words, weight_words, channels, shape, groups)
