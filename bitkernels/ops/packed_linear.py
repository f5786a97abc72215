"""packed_linear: a linear layer on words."""

from __future__ import annotations

import torch

from bitkernels.ops import _epilogue
from bitkernels.ops._contract import canonical, exact_dtype, outputs, signs
from bitkernels.ops._record import Call, Operator, Sample, define, rows
from bitkernels.ops.geometry import empty_real, empty_words, linear_geometry

_LINEAR = (
    "Tensor words, Tensor weight_words, SymInt channels, *, SymInt? out_channels=None, "
    + _epilogue.SCHEMA
)


def check(words, weight_words, channels, *, out_channels=None, **kw):
    shape = linear_geometry("packed_linear", words, weight_words, channels, out_channels)
    _epilogue.check("packed_linear", words, shape, shape[-1], **kw)
    return Call((words, weight_words, channels), dict(kw, out_channels=out_channels))


def fake(words, weight_words, channels, *, real, packed, out_channels=None, dtype=None, **_):
    *rest, cout = shape = linear_geometry("packed_linear", words, weight_words, channels,
                                          out_channels)
    return (empty_real(words, shape, dtype, False) if real else None,
            empty_words(words, rest, cout) if packed else None)


def reference(words, weight_words, channels, *, out_channels=None, dtype=None, sign_shift=None,
                  threshold=None, real=True, packed=False, **parts):
    weight_words = canonical(weight_words, 2, out_channels, 1)
    a = signs(words, channels, exact_dtype(words, channels))
    dot = (a @ signs(weight_words, channels, a.dtype).T).round().int()
    return outputs(dot, dot.dim() - 1, real, packed, dtype, sign_shift, threshold, **parts)


def samples(v):
    words, matrix = v.words(2, 3, 37), v.words(19, 37)
    linear, affine = (words, matrix, 37), dict(scale=v.real(19), bias=v.real(19))
    threshold = torch.stack([torch.arange(-9, 10), torch.arange(-5, 14)]).int()
    return [
        Sample(linear, affine), Sample(linear, dict(dtype=torch.int32)),
        Sample((words[0, 0], matrix, 37)), Sample(linear, dict(threshold=threshold), "packed"),
        Sample(linear, dict(affine, dtype=torch.bfloat16), "both"),
        Sample((v.words(9, 300), v.words(70, 300), 300), dict(dtype=torch.int32), "both",
               kernel={}),
        Sample((v.words(100, 70), v.words(40, 70), 70), v.epilogue((100, 40), 40), "both",
               kernel={})]


define(Operator(
    schemas=(
        f"packed_linear({_LINEAR}, {_epilogue.REAL_OUT}) -> Tensor",
        f"packed_linear.packed({_LINEAR}, {_epilogue.PACKED_OUT}, Tensor? threshold=None)"
        " -> Tensor",
        f"packed_linear.both({_LINEAR}, {_epilogue.REAL_OUT}, {_epilogue.PACKED_OUT})"
        " -> (Tensor, Tensor)"),
    group="Products of bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=rows("words", "residual"), product=True,
    text=f"""
A linear layer on words: dot products of signs, exact in int32, then an epilogue in float32. The
overload .packed gives the packed signs of the result, .both gives both.

The epilogue is that of packed_conv2d.

Arguments:
  words: int32 (..., ceil(channels / 32)), the packed input.
  weight_words: int32 (out, ceil(channels / 32)), or the same by tile_weight.
  channels: of the input.
  out_channels: out, needed for tiled weights where it is no multiple of 16.
{_epilogue.TEXT}{_epilogue.OUTPUTS_TEXT}{_epilogue.PACKED_TEXT}Returns:
  real (..., out); .packed: int32 (..., ceil(out / 32)); .both: the two.
Errors:
  those of packed_conv2d; binary_linear trains.
Example:
  >>> x, weight = torch.randn(5, 100), torch.randn(10, 100)
  >>> y = ops.packed_linear(ops.sign_pack(x), ops.sign_pack(weight), 100, dtype=torch.int32)
  >>> y.shape, y.dtype
  (torch.Size([5, 10]), torch.int32)
"""))
