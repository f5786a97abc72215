"""packed_conv2d_recompute: dot products again, for a backward.

A compiler sees forward and backward as one graph. A second packed_conv2d_moments of the same words
is to it the first one's result, which it then keeps from the forward to the backward: 2 bytes an
element, where the words are an eighth of one. This operator needs the gradient, so nothing can take
it for the one before or move it there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.ops._checks import check_real, check_same_device, describe, fail
from bitkernels.ops._record import Call, Operator, Sample, define, each, inside
from bitkernels.ops.geometry import empty_real
from bitkernels.ops.packed_conv2d import output_shape
from bitkernels.ops.packed_conv2d_moments import dot_dtype


def check(grad, words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1,
          *, pad_value=0, out_channels=None):
    """Errors of the convolution are packed_conv2d's."""
    op, args = "packed_conv2d_recompute", (words, weight_words, channels, stride, padding, dilation,
                                           groups)
    shape = output_shape(*args, pad_value=pad_value, out_channels=out_channels)
    check_real(op, "grad", grad)
    if grad.shape != shape:
        fail(op, "grad", f"of shape {tuple(shape)}", describe(grad))
    check_same_device(op, grad, words=words)
    return Call((grad, *args), dict(pad_value=pad_value, out_channels=out_channels,
                                    dtype=dot_dtype(weight_words, channels, groups)))


def fake(grad, words, *args, dtype, **kw):
    return empty_real(words, output_shape(words, *args, **kw), dtype, True)


def composed(grad, words, *args, **kw) -> Tensor:
    return inside(words)("packed_conv2d_moments", words, *args, relu=False, sums=False, **kw)[0]


def samples(v):
    words, filters = v.words(2, 5, 6, 37), v.words(19, 3, 3, 37)
    tiles = torch.ops.bitkernels.tile_weight(filters)
    return [Sample((v.real(2, 19, 2, 7), words, filters, 37, (2, 1), (1, 0, 2, 1))),
            Sample((v.real(2, 19, 3, 4).half(), words, tiles, 37),
                   dict(out_channels=19, pad_value=1))]


define(Operator(
    schemas=("packed_conv2d_recompute(Tensor grad, Tensor words, Tensor weight_words, "
             "SymInt channels, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
             "int groups=1, *, int pad_value=0, SymInt? out_channels=None) -> Tensor",),
    group="The residual block", check=check, fake=fake, composed=composed, samples=samples,
    batched=each, engine=False,
    text="""
The dot products of packed_conv2d_moments again, in a backward. In the graph of a compiler it needs
the gradient, so that the forward does not keep them.

Arguments:
  grad: real, of the output's shape; not read.
  words: as of packed_conv2d.
  weight_words: as of packed_conv2d.
  channels: as of packed_conv2d.
  stride: as of packed_conv2d.
  padding: as of packed_conv2d.
  dilation: as of packed_conv2d.
  groups: as of packed_conv2d.
  pad_value: as of packed_conv2d.
  out_channels: as of packed_conv2d.
Returns:
  the first output of packed_conv2d_moments.
Errors:
  those of packed_conv2d; a grad of another shape or device.
Example:
  >>> words = ops.sign_pack(torch.randn(2, 64, 8, 8), dim=1)
  >>> filters = ops.sign_pack(torch.randn(8, 64, 3, 3), dim=1)
  >>> dot, _ = ops.packed_conv2d_moments(words, filters, 64)
  >>> torch.equal(ops.packed_conv2d_recompute(dot.float(), words, filters, 64), dot)
  True
"""))
