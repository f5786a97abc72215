"""sign_pack and sign_pack_mask: shift, sign (and straight-through mask) and bitpack in one pass.

Two kernels: `rows` where channels are contiguous in memory (channels-last, matrices), `planes` for
every other stride (NCHW memory), where a thread walks the 32 channels of one row's word and
neighbouring threads take neighbouring rows, so reads stay coalesced without a layout copy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton import passes
from bitkernels.backends.triton.elementwise import collapse, wide
from bitkernels.backends.triton.jit import begin, block_index, pack_signs, row_offset, shift_tile
from bitkernels.backends.triton.launch import launch
from bitkernels.ops.geometry import empty_words, word_count


@triton.jit
def sign_pack_rows_kernel(x, shift, signs, masks, clip, rows, inner, channels, words, so, si,
                          each, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                          WIDE: tl.constexpr):
    begin()
    r = block_index(BLOCK_R, WIDE)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ok, col_ok = r < rows, c < channels
    ok = row_ok[:, None] & col_ok[None, :]
    row = row_offset(r, inner, so, si)
    v = tl.load(x + row[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if shift is not None:
        v = v + shift_tile(shift, r, c, ok, col_ok, channels, each)
    w = tl.program_id(1) * (BLOCK_C // 32) + tl.arange(0, BLOCK_C // 32)
    at = r[:, None] * words + w[None, :]
    out_ok = row_ok[:, None] & (w < words)[None, :]
    tl.store(signs + at, pack_signs(~(v < 0) & ok, BLOCK_R, BLOCK_C), mask=out_ok)
    if masks is not None:
        tl.store(masks + at, pack_signs((tl.abs(v) <= clip) & ok, BLOCK_R, BLOCK_C), mask=out_ok)


@triton.jit
def sign_pack_planes_kernel(x, shift, signs, masks, clip, rows, inner, channels, words, so, si, sc,
                            each, BLOCK_R: tl.constexpr, WIDE: tl.constexpr):
    r = block_index(BLOCK_R, WIDE)
    w = tl.program_id(1)
    row_ok = r < rows
    source = x + row_offset(r, inner, so, si)
    sign_word = tl.zeros([BLOCK_R], tl.int32)
    mask_word = tl.zeros([BLOCK_R], tl.int32)
    for bit in tl.static_range(32):
        c = w * 32 + bit
        ok = r < tl.where(c < channels, rows, 0)
        v = tl.load(source + c.to(r.dtype) * sc, mask=ok, other=0.0).to(tl.float32)
        if shift is not None:
            if each is None:
                v = v + tl.load(shift + c, mask=c < channels, other=0.0).to(tl.float32)
            else:
                v = v + tl.load(shift + (r // each) * channels + c, mask=ok,
                                other=0.0).to(tl.float32)
        sign_word |= (~(v < 0) & ok).to(tl.int32) << bit
        if masks is not None:
            mask_word |= ((tl.abs(v) <= clip) & ok).to(tl.int32) << bit
    tl.store(signs + r * words + w, sign_word, mask=row_ok)
    if masks is not None:
        tl.store(masks + r * words + w, mask_word, mask=row_ok)


def _launch(input, shift, clip, dim, with_mask):
    view = collapse(dim, input)
    if view is None:
        input = input.contiguous()
        view = collapse(dim, input)
    outer, inner, [(so, si, sc)] = view
    channels, rows = input.shape[dim], outer * inner
    rest = [s for i, s in enumerate(input.shape) if i != dim]
    signs = empty_words(input, rest, channels)
    masks = empty_words(input, rest, channels) if with_mask else None
    if rows == 0:
        return signs, masks
    each = None  # rows of a sample, where it has shifts of its own
    if shift is not None:
        each = None if shift.dim() == 1 else rows // input.shape[0]
        shift = shift.contiguous()
    words = word_count(channels)
    if sc == 1:
        block_r, block_c = passes.tile("sign_pack", 1, channels)
        grid = -(-rows // block_r), -(-channels // block_c)
        launch(sign_pack_rows_kernel, grid,
               (input, shift, signs, masks, clip, rows, None if outer == 1 else inner, channels,
                words, so, si, each), (passes.PASSES["sign_pack"].warps, None, None, True),
               BLOCK_R=block_r, BLOCK_C=block_c, WIDE=wide(input, signs))
    else:
        launch(sign_pack_planes_kernel, (-(-rows // 512), words),
               (input, shift, signs, masks, clip, rows, inner, channels, words, so, si, sc, each),
               (8,), BLOCK_R=512, WIDE=wide(input, signs))
    return signs, masks


def sign_pack(input, shift=None, dim=-1):
    return _launch(input, shift, 0.0, dim, False)[0]


def sign_pack_mask(input, clip, shift=None, dim=-1):
    return _launch(input, shift, float(clip), dim, True)
