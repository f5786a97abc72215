"""packed_min_pool2d: the minimum of signs is the and of their bits."""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.elementwise import wide
from bitkernels.backends.triton.jit import block_index
from bitkernels.backends.triton.launch import launch


@triton.jit
def packed_min_pool2d_kernel(words, out, total, width, H, W, OH, OW, SH, SW,
                             KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
                             WIDE: tl.constexpr):
    i = block_index(BLOCK, WIDE)
    ok = i < total
    word, pixel = i % width, i // width
    ow, line = pixel % OW, pixel // OW
    oh, n = line % OH, line // OH
    result = tl.full([BLOCK], -1, tl.int32)
    for tap in range(KH * KW):
        ih, iw = oh * SH + tap // KW, ow * SW + tap % KW
        result &= tl.load(words + ((n * H + ih) * W + iw) * width + word, mask=ok, other=0)
    tl.store(out + i, result, mask=ok)


def packed_min_pool2d(words, kernel, stride, size):
    words = words.contiguous()
    n, h, w, width = words.shape
    out = words.new_empty((n, *size, width))
    if out.numel():
        launch(packed_min_pool2d_kernel, (-(-out.numel() // 512), 1),
               (words, out, out.numel(), width, h, w, *size, *stride), (4,), KH=kernel[0],
               KW=kernel[1], BLOCK=512, WIDE=wide(words, out))
    return out
