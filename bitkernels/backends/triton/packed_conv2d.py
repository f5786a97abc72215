"""packed_conv2d: geometry and outputs of a call, then one contraction."""

from __future__ import annotations

from bitkernels import reference
from bitkernels.backends.triton import gemm
from bitkernels.ops.geometry import conv_geometry, empty_real, empty_words


def packed_conv2d(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1,
                  *, pad_value=0, out_channels=None, dtype=None, channels_last=True,
                  real=True, packed=False, inner, **parts):
    """(real tensor or None, packed signs or None); `inner`: one of those in `plan`."""
    shape, stride, pad, dilation = conv_geometry(
        "packed_conv2d", words, weight_words, channels, stride, padding, dilation, groups,
        pad_value, out_channels)
    if weight_words.dim() == 5:
        weight_words = reference.untile_weight(weight_words, shape[1], groups)
    images, cout, oh, ow = shape
    out = empty_real(words, shape, dtype, channels_last) if real else None
    signs = empty_words(words, (images, oh, ow), cout) if packed else None
    gemm.contract(inner, words.contiguous(), weight_words.contiguous(), channels,
                  stride, pad, dilation, groups, pad_value, (oh, ow), out, signs, **parts)
    return out, signs
