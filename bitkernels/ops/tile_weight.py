"""tile_weight: filters in the layout that the CPU kernels read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.ops._checks import describe, fail
from bitkernels.ops._record import Call, Operator, Sample, define, each
from bitkernels.ops.geometry import TILE


def check(weight_words, groups=1):
    op = "tile_weight"
    if weight_words.dtype != torch.int32 or weight_words.dim() not in (2, 4):
        fail(op, "weight_words", "int32 words of shape (Cout, kh, kw, words) or (Cout, words)",
             describe(weight_words))
    if groups < 1 or weight_words.shape[0] % groups:
        fail(op, "groups", f"a divisor of {weight_words.shape[0]} output channels", groups)
    return Call((weight_words, groups))


def fake(weight_words, groups):
    tiles = groups * ((weight_words.shape[0] // groups + TILE - 1) // TILE)
    return weight_words.new_empty((tiles, *weight_words.shape[1:], TILE))


def reference(weight_words: Tensor, groups: int = 1) -> Tensor:
    """(Cout, ..., words) to (tiles, ..., words, 16): 16 output channels innermost, 0-padded."""
    grouped = weight_words.unflatten(0, (groups, -1))
    per_group = grouped.shape[1]
    padding = [0, 0] * (weight_words.dim() - 1) + [0, -per_group % TILE]
    tiles = F.pad(grouped, padding).unflatten(1, (-1, TILE)).flatten(0, 1)
    return tiles.movedim(1, -1).contiguous()


def samples(v):
    words = v.words(19, 3, 3, 37)
    return [Sample((words,)), Sample((words[:18], 2)), Sample((v.words(19, 37),))]


define(Operator(
    schemas=("tile_weight(Tensor weight_words, int groups=1) -> Tensor",),
    group="Bits", check=check, fake=fake, reference=reference, samples=samples, batched=each,
    text="""
Packed filters in the layout that the CPU kernels read: 16 output channels innermost.

The packed operators take both forms. Tiled filters save a rearrangement a call on CPUs; each group
is filled up with zero rows to a multiple of 16, so out_channels must then be given.

Arguments:
  weight_words: int32 (Cout, kh, kw, words) or (Cout, words).
  groups: of the convolution, a divisor of Cout.
Returns:
  int32 (tiles, kh, kw, words, 16) or (tiles, words, 16).
Errors:
  weight_words of another type or rank, groups that do not divide Cout.
Example:
  >>> ops.tile_weight(torch.zeros(40, 3, 3, 2, dtype=torch.int32)).shape
  torch.Size([3, 3, 3, 2, 16])
"""))
