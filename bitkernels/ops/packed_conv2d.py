"""packed_conv2d: convolution of words with words."""

from __future__ import annotations

import torch

from bitkernels.ops import _epilogue
from bitkernels.ops._contract import canonical, dot_conv2d, outputs
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, images
from bitkernels.ops.geometry import conv_geometry, empty_real, empty_words

_CONV = (
    "Tensor words, Tensor weight_words, SymInt channels, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, int groups=1, *, int pad_value=0, SymInt? out_channels=None, "
    + _epilogue.SCHEMA
)


def output_shape(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1,
                 *, pad_value=0, out_channels=None, **_):
    """(N, Cout, OH, OW), the geometry checked."""
    return conv_geometry("packed_conv2d", words, weight_words, channels, stride, padding, dilation,
                         groups, pad_value, out_channels)[0]


def check(words, *args, pad_value=0, out_channels=None, channels_last=True, **kw):
    shape = output_shape(words, *args, pad_value=pad_value, out_channels=out_channels)
    _epilogue.check("packed_conv2d", words, shape, shape[1], **kw)
    return Call((words, *args), dict(kw, pad_value=pad_value, out_channels=out_channels,
                                     channels_last=channels_last))


def fake(words, *args, real, packed, dtype=None, channels_last=True, **kw):
    n, cout, oh, ow = shape = output_shape(words, *args, **kw)
    return (empty_real(words, shape, dtype, channels_last) if real else None,
            empty_words(words, (n, oh, ow), cout) if packed else None)


def reference(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1,
                  *, pad_value=0, out_channels=None, dtype=None, channels_last=True,
                  sign_shift=None, threshold=None, real=True, packed=False, **parts):
    """(real tensor or None, packed signs or None) as `real` and `packed` ask."""
    weight_words = canonical(weight_words, 4, out_channels, groups)
    dot = dot_conv2d(words, weight_words, channels, stride, padding, dilation, groups, pad_value)
    y, signs = outputs(dot, 1, real, packed, dtype, sign_shift, threshold, **parts)
    if y is not None:
        format = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=format).copy_(y)
    return y, signs


def samples(v):
    words, filters = v.words(2, 5, 6, 37), v.words(19, 3, 3, 37)
    geometry = (2, 1), (1, 0, 2, 1), (1, 1), 1
    conv, shape = (words, filters, 37, *geometry), (2, 19, 2, 7)
    c = [v.real(19) for _ in range(6)]
    parts = dict(scale=c[0], bias=c[1], clamp_min=0.0, residual=channels_last(v.real(*shape)),
                 shift_in=c[2], slope=c[3], shift_out=c[4])
    threshold = torch.stack([torch.arange(-9, 10), torch.arange(-5, 14)]).int()
    tiles = torch.ops.bitkernels.tile_weight(filters)
    small = (v.words(2, 9, 11, 70), v.words(40, 3, 3, 70), 70, (2, 1), (1, 0, 2, 1), (1, 2), 1)
    large = (v.words(1, 9, 9, 256), v.words(72, 3, 3, 256), 256, (1,), (1,), (1,), 1)
    return [
        Sample(conv), Sample(conv, dict(dtype=torch.int32)),
        Sample(conv, dict(parts, channels_last=False)),
        Sample((words, tiles, 37), dict(out_channels=19)),
        Sample(conv, dict(parts, sign_shift=c[5]), "packed"),
        Sample(conv, dict(threshold=threshold), "packed"),
        Sample(conv, dict(parts, dtype=torch.float16), "both"),
        Sample(conv, dict(dtype=torch.int32, pad_value=1), "both"),
        Sample(small, dict(dtype=torch.int32), "both", kernel={}),
        Sample(small, dict(v.epilogue((2, 40, 4, 10), 40), pad_value=1), "both", kernel={}),
        Sample(large, dict(dtype=torch.int32), "both", kernel={})]


define(Operator(
    schemas=(
        f"packed_conv2d({_CONV}, {_epilogue.REAL_OUT}, bool channels_last=True) -> Tensor",
        f"packed_conv2d.packed({_CONV}, {_epilogue.PACKED_OUT}, Tensor? threshold=None) -> Tensor",
        f"packed_conv2d.both({_CONV}, {_epilogue.REAL_OUT}, bool channels_last=True, "
        f"{_epilogue.PACKED_OUT}) -> (Tensor, Tensor)"),
    group="Products of bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=images("words", "residual"), product=True,
    text=f"""
Convolution of packed activations with packed filters: dot products of signs, exact in int32, then
an epilogue in float32. The overload .packed gives the packed signs of the result, .both gives both.

dot = K - 2 popcount(a xor w), with the K taps inside the image. The epilogue, each part optional,
one rounding a step: clamp, times scale plus bias, plus residual, RPReLU (shift_in, slope,
shift_out), then the sign with sign_shift or the cast to dtype.

Arguments:
  words: int32 (N, H, W, ceil(channels / 32)), the packed input.
  weight_words: int32 (Cout, kh, kw, ceil(channels / groups / 32)), or the same by tile_weight.
  channels: of the input; words alone cannot tell.
  stride: one or two integers, at least 1.
  padding: one, two (height, width) or four (top, bottom, left, right) integers, at least 0.
  dilation: one or two integers, at least 1.
  groups: a divisor of the input's and the output's channels.
  pad_value: 0: padding contributes nothing, as in nn.Conv2d; -1 or 1: it is that sign.
  out_channels: Cout, needed for tiled filters where it is no multiple of 16.
{_epilogue.TEXT}{_epilogue.OUTPUTS_TEXT}  channels_last: the memory format of the real output.
{_epilogue.PACKED_TEXT}Returns:
  real (N, Cout, OH, OW); .packed: int32 (N, OH, OW, ceil(Cout / 32)); .both: the two.
Errors:
  a RuntimeError that names the argument for words of the wrong type, rank or width, filters, sizes
  and vectors that do not fit, sums of 2^31 products and more, a threshold with other parts of the
  epilogue, an argument that requires a gradient: there is none, binary_conv2d trains.
Example:
  >>> x, weight = torch.randn(1, 64, 8, 8), torch.randn(40, 64, 3, 3)
  >>> words, filters = ops.sign_pack(x, dim=1), ops.sign_pack(weight, dim=1)
  >>> y = ops.packed_conv2d(words, filters, 64, padding=1)
  >>> sign = lambda t: torch.where(t < 0, -1.0, 1.0)
  >>> torch.equal(y, F.conv2d(sign(x), sign(weight), padding=1))
  True
  >>> ops.packed_conv2d.packed(words, filters, 64, padding=1).shape
  torch.Size([1, 8, 8, 2])
"""))
