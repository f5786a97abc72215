"""packed_conv2d_moments: dot products with their sums, for batch statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.ops._contract import as_rows, canonical, dot_conv2d
from bitkernels.ops._record import Call, Operator, Sample, define, each
from bitkernels.ops.geometry import empty_real
from bitkernels.ops.packed_conv2d import output_shape


def dot_dtype(weight_words: Tensor, channels: int, groups: int) -> torch.dtype:
    """int16 where every dot product fits, else int32."""
    products = weight_words.shape[1] * weight_words.shape[2] * (channels // groups)
    return torch.int16 if products < 2**15 else torch.int32


def check(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1, *,
          pad_value=0, out_channels=None, relu=False):
    """Errors are packed_conv2d's."""
    args = words, weight_words, channels, stride, padding, dilation, groups
    output_shape(*args, pad_value=pad_value, out_channels=out_channels)
    return Call(args, dict(pad_value=pad_value, out_channels=out_channels, relu=relu,
                           dtype=dot_dtype(weight_words, channels, groups)))


def fake(words, *args, dtype, relu, sums=True, **kw):
    shape = output_shape(words, *args, **kw)
    return (empty_real(words, shape, dtype, True),
            words.new_empty((3, shape[1]), dtype=torch.int64) if sums else None)


def reference(words, weight_words, channels, stride, padding, dilation, groups, *,
                          pad_value, out_channels, relu, dtype, sums=True):
    """Dot products in `dtype`, channels-last; their sums, sums of squares and count: (3, Cout).

    sums: in calls from `inside`, whether somebody wants them.
    """
    weight_words = canonical(weight_words, 4, out_channels, groups)
    dot = dot_conv2d(words, weight_words, channels, stride, padding, dilation, groups, pad_value)
    if not sums:
        return as_rows(dot.to(dtype)), None
    d = (dot.relu() if relu else dot).long()
    moments = torch.stack([t.sum((0, 2, 3)) for t in (d, d * d, torch.ones_like(d))])
    return as_rows(dot.to(dtype)), moments


def samples(v):
    words, filters = v.words(2, 5, 6, 37), v.words(19, 3, 3, 37)
    tiles = torch.ops.bitkernels.tile_weight(filters)
    small = (v.words(2, 9, 11, 70), v.words(40, 3, 3, 70), 70, (2, 1), (1, 0, 2, 1), (1, 2), 1)
    large = (v.words(1, 9, 9, 256), v.words(72, 3, 3, 256), 256, (1,), (1,), (1,), 1)
    return [Sample((words, filters, 37, (2, 1), (1, 0, 2, 1))),
            Sample((words, tiles, 37), dict(out_channels=19, relu=True, pad_value=1)),
            Sample(small, dict(relu=True, pad_value=-1), kernel=dict(dtype=torch.int32)),
            Sample(large, kernel={})]


define(Operator(
    schemas=("packed_conv2d_moments(Tensor words, Tensor weight_words, SymInt channels, "
             "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, *, "
             "int pad_value=0, SymInt? out_channels=None, bool relu=False) -> (Tensor, Tensor)",),
    group="Products of bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=each, product=True,
    text="""
Dot products of packed_conv2d with their sums for batch statistics, in one pass.

Arguments:
  words: as of packed_conv2d.
  weight_words: as of packed_conv2d.
  channels: as of packed_conv2d.
  stride: as of packed_conv2d.
  padding: as of packed_conv2d.
  dilation: as of packed_conv2d.
  groups: as of packed_conv2d.
  pad_value: as of packed_conv2d.
  out_channels: as of packed_conv2d.
  relu: take the sums of max(dot, 0).
Returns:
  (dot, moments): dot (N, Cout, OH, OW), int16 where a dot product has fewer than 2^15 products,
  else int32, channels-last; moments int64 (3, Cout): sum, sum of squares, count.
Errors:
  those of packed_conv2d.
Example:
  >>> words = ops.sign_pack(torch.randn(2, 64, 8, 8), dim=1)
  >>> filters = ops.sign_pack(torch.randn(8, 64, 3, 3), dim=1)
  >>> dot, moments = ops.packed_conv2d_moments(words, filters, 64)
  >>> dot.dtype, torch.equal(moments[0], dot.sum((0, 2, 3)))
  (torch.int16, True)
"""))
