"""mask_grad: the backward of a clipped straight-through sign."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.ops._checks import check_real, check_same_device, describe, fail, normalize_dim
from bitkernels.ops._contract import unpack_bits
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, rows
from bitkernels.ops.geometry import check_words, empty_around, word_count


def check(grad, mask_words, dim=-1):
    op = "mask_grad"
    check_real(op, "grad", grad)
    dim = normalize_dim(op, grad, dim)
    check_same_device(op, grad, mask_words=mask_words)
    check_words(op, "mask_words", mask_words, grad.shape[dim], grad.dim())
    rest = [s for i, s in enumerate(grad.shape) if i != dim]
    if list(mask_words.shape[:-1]) != rest:
        fail(op, "mask_words", f"of shape {(*rest, word_count(grad.shape[dim]))}",
             describe(mask_words))
    return Call((grad, mask_words, dim))


def fake(grad, mask_words, dim):
    return empty_around(grad, dim)


def reference(grad: Tensor, mask_words: Tensor, dim: int = -1) -> Tensor:
    """grad where its mask bit is set, else 0."""
    mask = unpack_bits(mask_words, grad.shape[dim]).movedim(-1, dim)
    return torch.where(mask, grad, torch.zeros_like(grad))


def samples(v):
    x, mask = v.real(2, 70, 5, 6), v.words(2, 5, 6, 70)
    return [Sample((x.movedim(1, -1)[:, ::2], mask[:, ::2])),
            *(Sample((t, mask, 1), kernel={}) for t in (x, channels_last(x.half())))]


define(Operator(
    schemas=("mask_grad(Tensor grad, Tensor mask_words, int dim=-1) -> Tensor",),
    group="Bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=rows("grad", "mask_words"),
    text="""
A gradient where its bit of a mask is set, else 0: the backward of a clipped straight-through sign.

Arguments:
  grad: float32, float16, bfloat16 or float64.
  mask_words: int32, from sign_pack_mask: the shape of grad with dim moved to the end and packed.
  dim: the dimension of grad that is packed in the mask.
Returns:
  the shape and dtype of grad.
Errors:
  a mask of another shape or type, a dim that is not there; a grad that requires a gradient.
Example:
  >>> _, mask = ops.sign_pack_mask(torch.tensor([[-2.0, 0.5, 3.0]]), 1.0)
  >>> ops.mask_grad(torch.ones(1, 3), mask).tolist()
  [[0.0, 1.0, 0.0]]
"""))
