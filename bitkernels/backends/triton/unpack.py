"""unpack: words to +-1 in a real type, channels innermost in memory whatever `dim` is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton.elementwise import wide
from bitkernels.backends.triton.jit import block_index


@triton.jit
def unpack_kernel(words, out, rows, channels, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                  WIDE: tl.constexpr):
    r = block_index(BLOCK_R, WIDE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (r < rows)[:, None] & (c < channels)[None, :]
    word = tl.load(words + r[:, None] * width + (c // 32)[None, :], mask=ok, other=0)
    sign = (((word >> (c % 32)[None, :]) & 1) * 2 - 1).to(tl.float32)
    tl.store(out + r[:, None] * channels + c[None, :], sign.to(out.dtype.element_ty), mask=ok)


def unpack(words, channels, dtype=torch.float32, dim=-1):
    words = words.contiguous()
    out = words.new_empty((*words.shape[:-1], channels), dtype=dtype)
    rows, width = out.numel() // channels, words.shape[-1]
    if rows:
        block_c = min(max(32, triton.next_power_of_2(channels)), 256)
        block_r = 4096 // block_c
        grid = (triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))
        unpack_kernel[grid](words, out, rows, channels, width, BLOCK_R=block_r, BLOCK_C=block_c,
                            WIDE=wide(out), num_warps=4, enable_fp_fusion=False)
    return out.movedim(-1, dim)
