"""rsign forward: sign(x + shift) in x's own type and layout, one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton import passes
from bitkernels.backends.triton.elementwise import together, wide
from bitkernels.backends.triton.jit import block_index, row_offset, shift_tile
from bitkernels.backends.triton.launch import launch
from bitkernels.ops.geometry import empty_around


@triton.jit
def rsign_kernel(x, shift, out, rows, inner, channels, so, si, sc, oo, oi, oc,
                 each, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                 WIDE: tl.constexpr):
    r = block_index(BLOCK_R, WIDE)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(r.dtype)
    col_ok = c < channels
    ok = (r < rows)[:, None] & col_ok[None, :]
    at = row_offset(r, inner, so, si)[:, None] + (c * sc)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0)
    v = v.to(tl.float32) + shift_tile(shift, r, c, ok, col_ok, channels, each)
    sign = tl.where(v < 0, -1.0, 1.0).to(out.dtype.element_ty)
    at = row_offset(r, inner, oo, oi)[:, None] + (c * oc)[None, :]
    tl.store(out + at, sign, mask=ok)


def rsign(input, shift):
    out = empty_around(input, 1)
    (input,), outer, inner, [strides, out_strides] = together(1, out, input)
    channels = input.shape[1]
    if outer * inner and channels:
        block_r, block_c = passes.tile("rsign", strides[2], channels)
        each = None if shift.dim() == 1 else outer * inner // input.shape[0]
        grid = (triton.cdiv(outer * inner, block_r), triton.cdiv(channels, block_c))
        launch(rsign_kernel, grid,
               (input, shift.contiguous(), out, outer * inner, None if outer == 1 else inner,
                channels, *strides, *out_strides, each), (passes.PASSES["rsign"].warps,),
               BLOCK_R=block_r, BLOCK_C=block_c, WIDE=wide(input, out))
    return out
