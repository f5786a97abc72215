"""unpack: words to -1 and +1."""

from __future__ import annotations

import torch

from bitkernels.ops._checks import REAL, fail, normalize_dim
from bitkernels.ops._contract import signs
from bitkernels.ops._record import Call, Operator, Sample, define, rows
from bitkernels.ops.geometry import check_words


def check(words, channels, dtype=torch.float32, dim=-1):
    check_words("unpack", "words", words, channels)
    if dtype not in REAL:
        fail("unpack", "dtype", "float32, float16, bfloat16 or float64", dtype)
    return Call((words, channels, dtype, normalize_dim("unpack", words, dim)))


def fake(words, channels, dtype, dim):
    return words.new_empty((*words.shape[:-1], channels), dtype=dtype).movedim(-1, dim)


def samples(v):
    words = v.words(2, 5, 6, 70)
    return [Sample((words, 70)), Sample((words.transpose(0, 1), 70, torch.float64, 0)),
            *(Sample((words, 70, dtype, 1), kernel={})
              for dtype in (torch.float32, torch.bfloat16))]


define(Operator(
    schemas=("unpack(Tensor words, SymInt channels, ScalarType dtype=float32, int dim=-1)"
             " -> Tensor",),
    group="Bits", check=check, fake=fake, reference=signs, samples=samples, batched=rows("words"),
    text="""
Words to -1 and +1, the opposite of sign_pack.

Arguments:
  words: int32 (..., ceil(channels / 32)).
  channels: the number of real channels, at least 1.
  dtype: float32, float16, bfloat16 or float64.
  dim: where the channels go in the result; they stay innermost in memory.
Returns:
  dtype, (..., channels) with the last dimension moved to dim.
Errors:
  words that are not int32 or not as wide as channels ask for, another dtype, a dim that is not
  there.
Example:
  >>> ops.unpack(torch.tensor([[6]], dtype=torch.int32), 3).tolist()
  [[-1.0, 1.0, 1.0]]
"""))
