"""The inner product on the 1-bit tensor core, by inline PTX in Triton: sm_80 to sm_90.

`mma.sync.m16n8k256 ... and.popc` needs its operands in registers in a fixed layout, which Triton
does not know. So every tensor here is one-dimensional with SLOTS = 8 elements a thread, and an
inline block tells each element its lane, warp and slot: addresses follow from the registers that
elements really live in, and no assumption is made on Triton's own layout but that equal tensors
are laid out equally (no shared memory is used then; the ahead-of-time tests assert it).

A warp owns 64 x 64 outputs: 4 row tiles (m) of 16 and 8 column tiles (n) of 8. With g = lane / 4
and t = lane % 4, element `slot` of a tensor is
  a_lo, a_hi   word t, and word 4 + t, of 8 of row   16 (slot / 2) + 8 (slot % 2) + g
  b_lo, b_hi   the same words of column              8 slot + g
  c[2 n + b]   row 16 (slot / 2) + 8 (slot % 2) + g, column 8 n + 2 t + b
so all 16 accumulators of a slot share their row: row values are read once, and a word of output
signs is an or over the accumulators and then over the 4 lanes of a quad.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.jit import epilogue, load_once, sign_bits

SLOTS = 8


def _mma_asm() -> tuple[str, str]:
    outputs = 16 * SLOTS
    a_lo, a_hi, b_lo, b_hi, c = (outputs + SLOTS * i for i in range(5))
    lines = []
    for m in range(4):
        for n in range(8):
            # Accumulator 2 half + b of tile (m, n) is element 2 m + half of tensor 2 n + b.
            tile = [(2 * n + b) * SLOTS + 2 * m + half for half in (0, 1) for b in (0, 1)]
            d = ", ".join(f"${i}" for i in tile)
            a = ", ".join(f"${base + 2 * m + half}" for base in (a_lo, a_hi) for half in (0, 1))
            b = f"${b_lo + n}, ${b_hi + n}"
            e = ", ".join(f"${c + i}" for i in tile)
            lines.append("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                         f"{{{d}}}, {{{a}}}, {{{b}}}, {{{e}}};")
    return "\n".join(lines), ",".join(["=&r"] * outputs + ["r"] * (outputs + 4 * SLOTS))


def _where_asm() -> tuple[str, str]:
    lines = ["{ .reg .u32 lane, warp;", "mov.u32 lane, %laneid;", "mov.u32 warp, %tid.x;",
             "shr.u32 warp, warp, 5;"]
    for slot in range(SLOTS):
        lines += [f"mov.u32 ${slot}, lane;", f"mov.u32 ${SLOTS + slot}, warp;",
                  f"mov.u32 ${2 * SLOTS + slot}, {slot};"]
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 3 * SLOTS + ["r"] * SLOTS)


def _quad_or_asm() -> tuple[str, str]:
    lines = ["{ .reg .b32 other;"]
    for slot in range(SLOTS):
        lines += [f"mov.b32 ${slot}, ${SLOTS + slot};"]
        for step in (1, 2):
            lines += [f"shfl.sync.bfly.b32 other, ${slot}, {step}, 31, -1;",
                      f"or.b32 ${slot}, ${slot}, other;"]
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * SLOTS + ["r"] * SLOTS)


def _fence_asm() -> tuple[str, str]:
    moves = [f"mov.b32 ${i}, ${SLOTS + i};" for i in range(SLOTS)]
    return "\n".join(["bar.warp.sync -1;", *moves]), ",".join(["=&r"] * SLOTS + ["r"] * SLOTS)


_MMA, _MMA_CONSTRAINTS = (tl.constexpr(s) for s in _mma_asm())
_WHERE, _WHERE_CONSTRAINTS = (tl.constexpr(s) for s in _where_asm())
_QUAD_OR, _QUAD_OR_CONSTRAINTS = (tl.constexpr(s) for s in _quad_or_asm())
_FENCE, _FENCE_CONSTRAINTS = (tl.constexpr(s) for s in _fence_asm())
_INT32X16 = tl.constexpr((tl.int32,) * 16)


@triton.jit
def place(i, WARPS: tl.constexpr):
    """(lane in its quad, slot, quad, row of the output) of every element."""
    # Not pure: what it says holds in this layout only, so it must never be computed in another.
    lane, warp, slot = tl.inline_asm_elementwise(
        _WHERE, _WHERE_CONSTRAINTS, [i], dtype=(tl.int32, tl.int32, tl.int32), is_pure=False,
        pack=8)
    return lane % 4, slot, lane // 4, (tl.program_id(0) * WARPS + warp) * 64 + slot * 8 + lane // 4


@triton.jit
def pixel_of(m, OH, OW):
    line = m // OW
    return line // OH, line % OH, m % OW


@triton.jit(do_not_specialize=["size_class"])
def b1_kernel(words, filters, out, packed, residual, clamp_min, clamp_max, scale, bias, shift_in,
              slope, shift_out, sign_shift, threshold, pa, border, corr, M, N, H, W, OH, OW, SH, SW,
              PT, PL, DH, DW, ron, roc, roh, row, oon, ooc, ooh, oow, size_class,
              BORDERS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr,
              KW: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Every tensor has fewer than 2^31 elements, channel vectors are float32, kh * kw <= 32.

    BLOCK_M is 64 for each warp; WIDTH is the words of a group, whose output channels 64 divides
    where GROUPS > 1. size_class is not used here: tuning depends on it.
    """
    WARPS: tl.constexpr = BLOCK_M // 64
    i = tl.arange(0, WARPS * 256)
    t, slot, g, m = place(i, WARPS)
    image, oh, ow = pixel_of(tl.minimum(m, M - 1), OH, OW)
    ih0, iw0 = oh * SH - PT, ow * SW - PL
    PIXEL: tl.constexpr = GROUPS * WIDTH
    first_n = tl.program_id(1) * 64
    group = 0
    if GROUPS > 1:
        group = first_n // (N // GROUPS)
    pixel = ((image * H + ih0) * W + iw0) * PIXEL + group * WIDTH
    column = tl.minimum(first_n + slot * 8 + g, N - 1) * (KH * KW * WIDTH)
    if PADDED:
        open_taps = i * 0
        for tap in tl.static_range(KH * KW):
            ih, iw = ih0 + (tap // KW) * DH, iw0 + (tap % KW) * DW
            inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            open_taps |= inside.to(tl.int32) << tap
    TOTAL: tl.constexpr = KH * KW * WIDTH
    acc = (i * 0,) * 16
    for start in range(0, TOTAL, 8):
        k_lo, k_hi = start + t, start + t + 4
        if WIDTH % 8 == 0:
            tap_lo = start // WIDTH
            tap_hi = tap_lo
            step = ((tap_lo // KW) * DH * W + (tap_lo % KW) * DW) * PIXEL + start % WIDTH
            a_lo_at, a_hi_at = pixel + (step + t), pixel + (step + t + 4)
        else:
            tap_lo, tap_hi = k_lo // WIDTH, k_hi // WIDTH
            a_lo_at = pixel + ((tap_lo // KW) * DH * W + (tap_lo % KW) * DW) * PIXEL + k_lo % WIDTH
            a_hi_at = pixel + ((tap_hi // KW) * DH * W + (tap_hi % KW) * DW) * PIXEL + k_hi % WIDTH
        if PADDED:
            a_lo = tl.load(words + a_lo_at, mask=((open_taps >> tap_lo) & (k_lo < TOTAL)) & 1 != 0,
                           other=0)
            a_hi = tl.load(words + a_hi_at, mask=((open_taps >> tap_hi) & (k_hi < TOTAL)) & 1 != 0,
                           other=0)
        elif TOTAL % 8 == 0:
            a_lo, a_hi = tl.load(words + a_lo_at), tl.load(words + a_hi_at)
        else:
            a_lo = tl.load(words + a_lo_at, mask=k_lo < TOTAL, other=0)
            a_hi = tl.load(words + a_hi_at, mask=k_hi < TOTAL, other=0)
        if TOTAL % 8 == 0:
            b_lo, b_hi = tl.load(filters + column + k_lo), tl.load(filters + column + k_hi)
        else:
            b_lo = tl.load(filters + column + k_lo, mask=k_lo < TOTAL, other=0)
            b_hi = tl.load(filters + column + k_hi, mask=k_hi < TOTAL, other=0)
        acc = tl.inline_asm_elementwise(
            _MMA, _MMA_CONSTRAINTS, (a_lo, a_hi, b_lo, b_hi) + acc, dtype=_INT32X16, is_pure=False,
            pack=8)
    # Placed anew: kept over the loop, these values would not fit beside the accumulators.
    t, slot, g, m = place(i, WARPS)
    row_ok = m < M
    safe_m = tl.minimum(m, M - 1)
    image, oh, ow = pixel_of(safe_m, OH, OW)
    base = -2 * tl.load(pa + safe_m * GROUPS + group)
    if BORDERS > 1:
        class_at = tl.load(border + safe_m) * N
    if residual is not None:
        residual_at = image * ron + oh * roh + ow * row
    if out is not None:
        out_at = image * oon + oh * ooh + ow * oow
    word_0 = i * 0
    word_1 = i * 0
    for j in tl.static_range(16):
        # Keeps the loads of later steps from being drawn up here, where registers are short.
        t = tl.inline_asm_elementwise(_FENCE, _FENCE_CONSTRAINTS, [t], dtype=tl.int32,
                                      is_pure=False, pack=8)
        n = first_n + (j // 2) * 8 + 2 * t + j % 2
        col_ok = n < N
        ok = row_ok & col_ok
        safe_n = tl.minimum(n, N - 1)
        if BORDERS > 1:
            dot = 4 * acc[j] + (base + tl.load(corr + (class_at + safe_n)))
        else:
            dot = 4 * acc[j] + (base + load_once(corr + safe_n))
        if residual is not None:
            added = tl.load(residual + (residual_at + safe_n * roc), mask=ok, other=0.0)
        else:
            added = None
        y = epilogue(dot, safe_n, col_ok, added, clamp_min, clamp_max, scale, bias, shift_in,
                     slope, shift_out, True)
        if out is not None:
            if out.dtype.element_ty.is_int():
                tl.store(out + (out_at + n * ooc), dot.to(out.dtype.element_ty), mask=ok)
            else:
                tl.store(out + (out_at + n * ooc), y.to(out.dtype.element_ty), mask=ok)
        if packed is not None:
            bit = sign_bits(y, dot, safe_n, col_ok, sign_shift, threshold, N,
                            True).to(tl.int32)
            if j < 8:
                word_0 |= bit << ((j // 2) * 8 + 2 * t + j % 2)
            else:
                word_1 |= bit << ((j // 2) * 8 + 2 * t + j % 2 - 32)
    if packed is not None:
        word_0 = tl.inline_asm_elementwise(_QUAD_OR, _QUAD_OR_CONSTRAINTS, [word_0],
                                           dtype=tl.int32, is_pure=False, pack=8)
        word_1 = tl.inline_asm_elementwise(_QUAD_OR, _QUAD_OR_CONSTRAINTS, [word_1],
                                           dtype=tl.int32, is_pure=False, pack=8)
        width = (N + 31) // 32
        at = first_n // 32 + t
        tl.store(packed + m * width + at, tl.where(t == 0, word_0, word_1),
                 mask=row_ok & (t < 2) & (at < width))
