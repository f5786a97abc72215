"""unpack: words to +-1 in a real type, channels innermost in memory whatever `dim` is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import passes
from bitkernels.backends.triton.elementwise import as_bytes, wide
from bitkernels.backends.triton.jit import block_index
from bitkernels.backends.triton.launch import launch


@triton.jit
def unpack_kernel(words, out, count, channels, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The words come as bytes, `count` in all and `width` a row, each for the 8 channels that a
    thread stores. Neighbours are neighbours in memory, also where a row ends."""
    at = block_index(BLOCK, WIDE)
    bit = tl.arange(0, 8)[None, :]
    c = (at % width * 8)[:, None] + bit
    byte = tl.load(words + at, mask=at < count, other=0)[:, None]
    sign = (((byte.to(tl.int32) >> bit) & 1) * 2 - 1).to(tl.float32)
    tl.store(out + ((at // width * channels)[:, None] + c), sign.to(out.dtype.element_ty),
             mask=(at < count)[:, None] & (c < channels))


def unpack(words, channels, dtype=torch.float32, dim=-1):
    words = as_bytes(words)
    out = torch.empty((*words.shape[:-1], channels), dtype=dtype, device=words.device)
    found, count = passes.PASSES["unpack"], words.numel()
    if count:
        block = found.elements // 8
        launch(unpack_kernel, (-(-count // block), 1), (words, out, count, channels,
               words.shape[-1]), (found.warps,), BLOCK=block, WIDE=wide(words, out))
    return out.movedim(-1, dim)
