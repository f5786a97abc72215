"""packed_min_pool2d: the minimum of signs, which is the and of bits."""

from __future__ import annotations

import torch.nn.functional as F

from bitkernels.ops._contract import pack_bits, unpack_bits
from bitkernels.ops._record import Call, Operator, Sample, define, images
from bitkernels.ops.packed_max_pool2d import pool_geometry


def check(words, kernel_size, stride=()):
    kernel, stride, *_, size = pool_geometry(words, kernel_size, stride, (0,), (1,), False,
                                             op="packed_min_pool2d")
    return Call((words, kernel, stride, size))


def fake(words, kernel, stride, size):
    return words.new_empty((words.shape[0], *size, words.shape[3]))


def reference(words, kernel, stride, size):
    if words.shape[3] == 0:  # which the library refuses
        return words.new_empty(words.shape[0], *size, 0)
    bits = unpack_bits(words, words.shape[3] * 32).movedim(-1, 1).float()
    return pack_bits((-F.max_pool2d(-bits, kernel, stride) > 0).movedim(1, -1))


def samples(v):
    words = v.words(2, 7, 6, 70)
    return [Sample((words, (2,))), Sample((words, (2, 3), (1, 2)), kernel={})]


define(Operator(
    schemas=("packed_min_pool2d(Tensor words, int[2] kernel_size, int[2] stride=[]) -> Tensor",),
    group="Bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=images("words"),
    text="""
Minimum of signs in each window, on words: the and of bits. The result is packed again.

Arguments:
  words: int32 (N, H, W, words).
  kernel_size: one or two integers, at least 1.
  stride: one or two; (): as kernel_size.
Returns:
  int32 (N, OH, OW, words).
Errors:
  words of another type or rank, sizes out of range, a window larger than the image.
Example:
  >>> words = ops.sign_pack(torch.randn(1, 64, 8, 8), dim=1)
  >>> ops.packed_min_pool2d(words, 2).shape
  torch.Size([1, 4, 4, 2])
"""))
