"""unpack: words to +-1 in a real type, channels innermost in memory whatever `dim` is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import passes
from bitkernels.backends.triton.elementwise import wide
from bitkernels.backends.triton.jit import block_index


@triton.jit
def unpack_kernel(words, out, rows, channels, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                  WIDE: tl.constexpr):
    """The words come as bytes, one for the 8 channels that a thread stores."""
    r = block_index(BLOCK_R, WIDE)[:, None, None]
    b = (tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8))[None, :, None]
    bit = tl.arange(0, 8)[None, None, :]
    c = b * 8 + bit
    ok = (r < rows) & (c < channels)
    byte = tl.load(words + r * width + b, mask=(r < rows) & (b * 8 < channels), other=0)
    sign = (((byte.to(tl.int32) >> bit) & 1) * 2 - 1).to(tl.float32)
    tl.store(out + r * channels + c, sign.to(out.dtype.element_ty), mask=ok)


def unpack(words, channels, dtype=torch.float32, dim=-1):
    words = words.contiguous().view(torch.int8)
    out = torch.empty((*words.shape[:-1], channels), dtype=dtype, device=words.device)
    rows, width = out.numel() // channels, words.shape[-1]
    if rows:
        block_r, block_c = passes.tile("unpack", 1, channels)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(channels, block_c))
        unpack_kernel[grid](words, out, rows, channels, width, BLOCK_R=block_r,
                            BLOCK_C=block_c, WIDE=wide(words, out),
                            num_warps=passes.PASSES["unpack"].warps, enable_fp_fusion=False)
    return out.movedim(-1, dim)
