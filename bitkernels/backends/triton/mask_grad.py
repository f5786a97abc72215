"""mask_grad: the gradient where its mask bit is set, else 0, in the gradient's own layout."""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.elementwise import tile_shape, together, wide
from bitkernels.backends.triton.jit import block_index
from bitkernels.ops.geometry import empty_around


@triton.jit
def mask_grad_kernel(grad, masks, out, rows, inner, channels, words, so, si, sc, oo, oi, oc,
                     BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    r = block_index(BLOCK_R, WIDE)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(r.dtype)
    ok = (r < rows)[:, None] & (c < channels)[None, :]
    outer, rest = r // inner, r % inner
    g = tl.load(grad + (outer * so + rest * si)[:, None] + (c * sc)[None, :], mask=ok, other=0.0)
    word = tl.load(masks + r[:, None] * words + (c // 32)[None, :], mask=ok, other=0)
    bit = (word >> (c % 32).to(tl.int32)[None, :]) & 1
    kept = tl.where(bit != 0, g, 0.0).to(g.dtype)
    tl.store(out + (outer * oo + rest * oi)[:, None] + (c * oc)[None, :], kept, mask=ok)


def mask_grad(grad, mask_words, dim=-1):
    out = empty_around(grad, dim)
    (grad,), outer, inner, [strides, out_strides] = together(dim, out, grad)
    channels = grad.shape[dim]
    if outer * inner:
        block_r, block_c = tile_shape(strides[2], channels)
        grid = (triton.cdiv(outer * inner, block_r), triton.cdiv(channels, block_c))
        mask_grad_kernel[grid](grad, mask_words.contiguous(), out, outer * inner, inner, channels,
                               mask_words.shape[-1], *strides, *out_strides, BLOCK_R=block_r,
                               BLOCK_C=block_c, WIDE=wide(grad, out),
                               num_warps=4, enable_fp_fusion=False)
    return out
