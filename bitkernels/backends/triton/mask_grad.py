"""mask_grad: the gradient where its mask bit is set, else 0, in the gradient's own layout."""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton import passes
from bitkernels.backends.triton.elementwise import as_bytes, together, wide
from bitkernels.backends.triton.jit import block_index, row_offset
from bitkernels.backends.triton.launch import launch
from bitkernels.ops.geometry import empty_around


@triton.jit
def mask_grad_kernel(grad, masks, out, rows, inner, channels, width, so, si, sc, oo, oi, oc,
                     BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """The masks come as bytes, one for 8 channels of a row.

    Bytes are the tile's first dimension: of rows and bytes, with no neighbours in memory either,
    Triton gives a warp the first, and a row's bytes lie together.
    """
    r = block_index(BLOCK_R, WIDE)[None, :, None]
    b = (tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)).to(r.dtype)[:, None, None]
    bit = tl.arange(0, 8)[None, None, :]
    c = b * 8 + bit
    ok = (r < rows) & (c < channels)
    g = tl.load(grad + (row_offset(r, inner, so, si) + c * sc), mask=ok, other=0.0)
    byte = tl.load(masks + r * width + b, mask=(r < rows) & (b * 8 < channels), other=0)
    kept = tl.where((byte.to(tl.int32) >> bit) & 1 != 0, g, 0.0).to(g.dtype)
    tl.store(out + (row_offset(r, inner, oo, oi) + c * oc), kept, mask=ok)


def mask_grad(grad, mask_words, dim=-1):
    out = empty_around(grad, dim)
    (grad,), outer, inner, [strides, out_strides] = together(dim, out, grad)
    channels, masks = grad.shape[dim], as_bytes(mask_words)
    if outer * inner:
        block_r, block_c = passes.tile("mask_grad", strides[2], channels)
        grid = (triton.cdiv(outer * inner, block_r), triton.cdiv(channels, block_c))
        launch(mask_grad_kernel, grid,
               (grad, masks, out, outer * inner, None if outer == 1 else inner, channels,
                masks.shape[-1], *strides, *out_strides), (passes.PASSES["mask_grad"].warps,),
               BLOCK_R=block_r, BLOCK_C=block_c, WIDE=wide(grad, masks, out))
    return out
