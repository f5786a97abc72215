"""packed_max_pool2d: the maximum of signs is the or of their bits; padding never wins."""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.elementwise import wide
from bitkernels.backends.triton.jit import block_index
from bitkernels.backends.triton.launch import launch
from bitkernels.ops.packed_max_pool2d import pool_geometry


@triton.jit
def packed_max_pool2d_kernel(words, out, total, width, H, W, OH, OW, SH, SW, PT, PL, DH, DW,
                             KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
                             WIDE: tl.constexpr):
    i = block_index(BLOCK, WIDE)
    ok = i < total
    word, pixel = i % width, i // width
    ow, line = pixel % OW, pixel // OW
    oh, n = line % OH, line // OH
    result = tl.zeros([BLOCK], tl.int32)
    for tap in range(KH * KW):
        ih = oh * SH - PT + (tap // KW) * DH
        iw = ow * SW - PL + (tap % KW) * DW
        inside = ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        result |= tl.load(words + ((n * H + ih) * W + iw) * width + word, mask=inside, other=0)
    tl.store(out + i, result, mask=ok)


def packed_max_pool2d(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    kernel, stride, padding, dilation, (oh, ow) = pool_geometry(
        words, kernel_size, stride, padding, dilation, ceil_mode)
    words = words.contiguous()
    n, h, w, width = words.shape
    out = words.new_empty((n, oh, ow, width))
    if out.numel():
        launch(packed_max_pool2d_kernel, (-(-out.numel() // 512), 1),
               (words, out, out.numel(), width, h, w, oh, ow, *stride, *padding, *dilation), (4,),
               KH=kernel[0], KW=kernel[1], BLOCK=512, WIDE=wide(words, out))
    return out
