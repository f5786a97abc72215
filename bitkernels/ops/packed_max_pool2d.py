"""packed_max_pool2d: the maximum of signs, which is the or of bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bitkernels.ops._checks import describe, fail
from bitkernels.ops._contract import pack_bits, unpack_bits
from bitkernels.ops._record import Call, Operator, Sample, define, images
from bitkernels.ops.geometry import pooled_size


def pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode,
                  op="packed_max_pool2d"):
    """Checked (kernel, stride, padding, dilation, (OH, OW))."""
    if words.dtype != torch.int32 or words.dim() != 4:
        fail(op, "words", "int32 words of shape (N, H, W, words)", describe(words))
    return pooled_size(op, words.shape[1:3], kernel_size, stride, padding, dilation, ceil_mode)


def check(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    pool_geometry(words, kernel_size, stride, padding, dilation, ceil_mode)
    return Call((words, kernel_size, stride, padding, dilation, ceil_mode))


def fake(words, *geometry):
    *_, (oh, ow) = pool_geometry(words, *geometry)
    return words.new_empty((words.shape[0], oh, ow, words.shape[3]))


def reference(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    """Maximum of signs = or of bits; padding never wins, as in `nn.MaxPool2d`."""
    kernel, stride, padding, dilation, size = pool_geometry(
        words, kernel_size, stride, padding, dilation, ceil_mode)
    if not words.numel():  # which the library refuses
        return words.new_zeros(words.shape[0], *size, words.shape[-1])
    bits = unpack_bits(words, words.shape[-1] * 32).movedim(-1, 1).float()
    most = F.max_pool2d(bits, kernel, stride, padding, dilation, ceil_mode)
    return pack_bits((most > 0).movedim(1, -1))  # -inf where a window holds padding alone


def samples(v):
    words = v.words(2, 7, 6, 70)
    return [Sample((words, (2, 2))), Sample((words, (3,), (2,), (1,), (1,), True)),
            Sample((words, (3, 3), (2, 2), (1, 1), (1, 1), False), kernel={})]


define(Operator(
    schemas=("packed_max_pool2d(Tensor words, int[2] kernel_size, int[2] stride=[], "
             "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> Tensor",),
    group="Bits", check=check, fake=fake, reference=reference, samples=samples,
    batched=images("words"),
    text="""
Maximum of signs in each window, on words: the or of bits. The result is packed again.

Arguments:
  words: int32 (N, H, W, words).
  kernel_size: one or two integers, at least 1.
  stride: one or two; (): as kernel_size.
  padding: at least 0, at most half of kernel_size; it never wins.
  dilation: at least 1.
  ceil_mode: round the output's size up, as nn.MaxPool2d.
Returns:
  int32 (N, OH, OW, words).
Errors:
  words of another type or rank, sizes out of range, a window larger than the padded image.
Example:
  >>> words = ops.sign_pack(torch.randn(1, 64, 8, 8), dim=1)
  >>> ops.packed_max_pool2d(words, 2).shape
  torch.Size([1, 4, 4, 2])
"""))
