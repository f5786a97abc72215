"""sign_pack and sign_pack_mask: signs to words, and the mask of the straight-through estimator."""

from __future__ import annotations

from torch import Tensor

from bitkernels.ops._checks import (
    check_clip,
    check_real,
    check_shift,
    describe,
    fail,
    normalize_dim,
)
from bitkernels.ops._contract import pack_bits, shifted
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, per_sample, rows
from bitkernels.ops.geometry import empty_words


def check(input, shift=None, dim=-1, *, op="sign_pack"):
    check_real(op, "input", input)
    dim = normalize_dim(op, input, dim)
    if input.shape[dim] < 1:
        fail(op, "input", "at least 1 channel wide", describe(input))
    if shift is not None:
        check_shift(op, input, shift, dim)
    return Call((input, shift, dim))


def fake(input, shift, dim):
    rest = [s for i, s in enumerate(input.shape) if i != dim]
    return empty_words(input, rest, input.shape[dim])


def reference(input: Tensor, shift: Tensor | None = None, dim: int = -1) -> Tensor:
    return pack_bits(~(shifted(input, shift, dim) < 0))


def samples(v):
    x = v.real(2, 70, 5, 6)
    last = channels_last(v.real(2, 70, 5, 6).half())
    return [
        Sample((x,)), Sample((channels_last(x)[:, :, ::2], v.real(70), 1)),
        Sample((x, v.real(2, 1, 1, 6))), Sample((x.bfloat16(), None, 0)),
        *(Sample((t, shift, 1), kernel={}) for t in (x, last)
          for shift in (None, v.real(70), v.real(2, 70, 1, 1)))]


def check_mask(input, clip, shift=None, dim=-1):
    op = "sign_pack_mask"
    _, shift, dim = check(input, shift, dim, op=op).args
    check_clip(op, "clip", clip)
    return Call((input, clip, shift, dim))


def fake_mask(input, clip, shift, dim):
    return fake(input, shift, dim), fake(input, shift, dim)


def reference_mask(input: Tensor, clip: float, shift: Tensor | None = None, dim: int = -1):
    """Signs of input + shift and its straight-through mask |input + shift| <= clip, both packed."""
    x = shifted(input, shift, dim)
    return pack_bits(~(x < 0)), pack_bits(x.abs() <= clip)


def samples_mask(v):
    x = v.real(2, 70, 5, 6)
    last = channels_last(x.half())
    return [Sample((x, 1.0, v.real(2, 70, 1, 1), 1)), Sample((last, 1.25)),
            *(Sample((t, 1.5, v.real(70), 1), kernel={}) for t in (x, last))]


define(Operator(
    schemas=("sign_pack(Tensor input, Tensor? shift=None, int dim=-1) -> Tensor",),
    group="Bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=per_sample(rows("input")),
    text="""
Words of sign(input + shift), 32 signs to an int32, along a dimension, which becomes the last.

Bit 1 is +1, and a value is +1 unless it is below 0: 0, -0.0 and NaN are +1. Least significant bit
first; bits past the last channel are 0.

Arguments:
  input: float32, float16, bfloat16 or float64, any shape and memory format.
  shift: real, added before the sign: (C,), one number a channel; or one a channel of each sample,
    of the input's rank, N in dimension 0, C in dim and 1 elsewhere, which takes a dim that is not
    0; None: none.
  dim: the dimension of the channels, which becomes the last.
Returns:
  int32, the shape of input with dim moved to the end and divided by 32, rounded up.
Errors:
  an integer input, a dim that is not there, no channel, a shift of another shape or device; an
  input that requires a gradient, of which there is none: use rsign or detach it.
Example:
  >>> ops.sign_pack(torch.tensor([[-1.0, 1.0, 0.0]])).tolist()
  [[6]]
  >>> ops.sign_pack(torch.randn(2, 40, 5, 5), dim=1).shape
  torch.Size([2, 5, 5, 2])
"""))
define(Operator(
    schemas=("sign_pack_mask(Tensor input, float clip, Tensor? shift=None, int dim=-1)"
             " -> (Tensor, Tensor)",),
    group="Bits", check=check_mask, fake=fake_mask, reference=reference_mask, samples=samples_mask,
    batched=per_sample(rows("input")),
    text="""
Words of sign(input + shift), and of the mask of the straight-through estimator, in one pass.

Arguments:
  input: as of sign_pack.
  clip: at least 0; the mask is 1 where |input + shift| <= clip.
  shift: as of sign_pack.
  dim: as of sign_pack.
Returns:
  (signs, mask), both as sign_pack's result.
Errors:
  those of sign_pack; a clip below 0 or NaN.
Example:
  >>> signs, mask = ops.sign_pack_mask(torch.tensor([[-2.0, 0.5, 3.0]]), 1.0)
  >>> signs.item(), mask.item()
  (6, 2)
"""))
