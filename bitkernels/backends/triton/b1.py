"""The inner product on the 1-bit tensor core, by inline PTX in Triton: sm_80 to sm_90.

`mma.sync.m16n8k256 ... and.popc` needs its operands in registers in a fixed layout, which Triton
does not know. So every tensor here is one-dimensional with SLOTS elements a thread, and an inline
block tells each element its lane, warp and slot: addresses follow from the registers that elements
really live in, and no assumption is made on Triton's own layout but that equal tensors are laid out
equally (no shared memory is used then; the ahead-of-time tests assert it).

A warp owns 8 SLOTS x 64 outputs: row tiles of 16 and 8 column tiles of 8. With g = lane / 4 and
t = lane % 4, element `slot` of a tensor belongs to row 8 slot + g, and
  a_lo, a_hi   are words t, and 4 + t, of 8 of that row
  b_lo, b_hi   of column tile j the same words of column 8 j + g
  c[2 j + b]   is column 8 j + 2 t + b
The order of words in K and the order of columns are free, and chosen for wide loads and stores:
  a thread reads its WORDS words of a step (words t, 4 + t, ... of the products) side by side, and
  column 8 j + 2 t + b is channel 32 (j / 4) + 8 t + 2 (j % 4) + b: a thread owns twice 8
  neighbours, which are 16 bytes of fp16, and a byte of the row's signs.
A ninth column tile of ones counts the bits of each row's window, pa of contraction.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.b1_memory import (
    channels,
    corrections,
    fence,
    half_of,
    load,
    load_once,
    load_where,
    pair,
    store,
)
from bitkernels.backends.triton.b1_ptx import (
    INT32,
    MMA,
    MMA_IO,
    STORE_SIGNS,
    STORE_SIGNS_IO,
    WHERE,
    WHERE_IO,
)
from bitkernels.backends.triton.contraction import border_class, outside
from bitkernels.backends.triton.jit import activate, begin

UNROLLED = tl.constexpr(16)  # steps of products, at most, without a loop


@triton.jit
def place(i, WARPS: tl.constexpr, SLOTS: tl.constexpr):
    """(lane in its quad, slot, quad, row of the output) of every element."""
    # Not pure: what it says holds in this layout only, so it must never be computed in another.
    lane, warp, slot = tl.inline_asm_elementwise(
        WHERE[SLOTS // 8], WHERE_IO[SLOTS // 8], [i], dtype=INT32[3], is_pure=False, pack=SLOTS)
    first = (tl.program_id(0) * WARPS + warp) * (8 * SLOTS)
    return lane % 4, slot, lane // 4, first


@triton.jit
def divide(n, magic, shift):
    """n // d for 0 <= n < 2^31, by `gemm.reciprocal(d)`."""
    u = n.to(tl.uint32, bitcast=True)
    high = tl.umulhi(u, magic.to(tl.uint32, bitcast=True))
    return ((high + u) >> shift.to(tl.uint32)).to(tl.int32, bitcast=True)


@triton.jit
def pixel_of(m, OH, OW, OWM, OWS, OHM, OHS):
    """(image, row, column) of an output."""
    line = divide(m, OWM, OWS)
    image = divide(line, OHM, OHS)
    return image, line - image * OH, m - line * OW


@triton.jit
def fetch(words, pixel, open_taps, column, filters, n, N, start, t, W, DH, DW,
          SLOTS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
          WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PADDED: tl.constexpr,
          WHOLE: tl.constexpr):
    """(words of the rows, words of the column tiles, tile by tile) of K from `start` on."""
    PIXEL: tl.constexpr = GROUPS * WIDTH
    TOTAL: tl.constexpr = KH * KW * WIDTH
    rows = ()
    for part in tl.static_range(CHUNK // (4 * WORDS)):
        lane = part * 4 * WORDS + t * WORDS
        k = start + lane
        # What is constant comes last: it becomes the offset inside the instruction.
        if WIDTH % CHUNK == 0:
            tap = start // WIDTH
            at = words + (pixel + ((tap // KW) * DH * W * PIXEL + lane))
            at += (tap % KW) * DW * PIXEL + start % WIDTH
        else:
            tap = k // WIDTH
            at = (words + pixel) + (((tap // KW) * DH * W + (tap % KW) * DW) * PIXEL + k % WIDTH)
        if PADDED:
            condition = (open_taps >> tap) & 1
            if TOTAL % CHUNK != 0:
                condition = tl.where(k < TOTAL, condition, 0)
            rows = rows + load_where(at, condition, SLOTS, WORDS)
        elif TOTAL % CHUNK != 0:
            rows = rows + load_where(at, (k < TOTAL).to(tl.int32), SLOTS, WORDS)
        else:
            rows = rows + load(at, SLOTS, WORDS)
    tiles = ()
    for j in tl.static_range(8):
        channel = 32 * (j // 4) + 2 * (j % 4)
        for part in tl.static_range(CHUNK // (4 * WORDS)):
            k = start + (part * 4 * WORDS + t * WORDS)
            if TOTAL % CHUNK != 0:  # what is read instead meets zeros
                k = tl.minimum(k, TOTAL - WORDS)
            if WHOLE:
                tiles = tiles + load_once(column + k + channel * TOTAL, SLOTS, WORDS)
            else:
                row = tl.minimum(n + channel, N - 1) * TOTAL
                tiles = tiles + load_once(filters + (row + k), SLOTS, WORDS)
    return rows, tiles


@triton.jit
def multiply(rows, tiles, acc, SLOTS: tl.constexpr, CHUNK: tl.constexpr):
    EACH: tl.constexpr = CHUNK // 4  # words of a thread
    for u in tl.static_range(CHUNK // 8):
        low = ()
        high = ()
        for j in tl.static_range(8):
            low = low + (tiles[EACH * j + 2 * u],)  # type: ignore[assignment]
            high = high + (tiles[EACH * j + 2 * u + 1],)  # type: ignore[assignment]
        acc = tl.inline_asm_elementwise(
            MMA[SLOTS // 8], MMA_IO[SLOTS // 8],
            (rows[2 * u], rows[2 * u + 1]) + low + high + acc, dtype=INT32[18], is_pure=False,
            pack=SLOTS)
    return acc


@triton.jit
def taps_inside(top, bottom, left, right, KH: tl.constexpr, KW: tl.constexpr):
    """A bit for each tap of a window, fewer than 32, set where it lies inside the image."""
    ROW: tl.constexpr = (1 << KW) - 1
    ALL: tl.constexpr = (1 << (KH * KW)) - 1
    columns = (ROW << left) & (ROW >> right)
    return columns * (ALL // ROW) & (ALL << top * KW) & (ALL >> bottom * KW)


@triton.jit(do_not_specialize=["size_class", "OWM", "OWS", "OHM", "OHS"])
def b1_kernel(words, filters, out, packed, residual, clamp_min, clamp_max, scale, bias, shift_in,
              slope, shift_out, sign_shift, threshold, corr, M, N, H, W, OH, OW, OWM, OWS, OHM, OHS,
              SH, SW, PT, PL, DH, DW, ron, roc, roh, row, oon, ooc, ooh, oow, size_class,
              TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
              GROUPS: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr,
              KW: tl.constexpr, PADDED: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr,
              EIGHTS: tl.constexpr, OUT_WIDE: tl.constexpr, RESIDUAL_WIDE: tl.constexpr,
              WORDS: tl.constexpr, SLOTS: tl.constexpr, LINES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Every tensor has fewer than 2^31 elements, channel vectors are float32, kh * kw < 32.

    BLOCK_M is 8 SLOTS for each warp; WIDTH is the words of a group, whose output channels 64
    divides where GROUPS > 1. WORDS divides WIDTH: 1, 2 or 4. OWM, OWS, OHM, OHS: reciprocals of
    OW and OH. FLAT: images and filters of one pixel. WHOLE: 64 divides N; EIGHTS: 8 does, and
    vectors are at addresses that 16 divides. OUT_WIDE, RESIDUAL_WIDE: 8 channels of the tensor are
    neighbours, at such an address, and pixels follow one another. LINES: a loop over the lines of
    a filter, if its words fill steps. size_class is not used here: tuning depends on it.
    """
    begin()
    WARPS: tl.constexpr = BLOCK_M // (8 * SLOTS)
    TOTAL: tl.constexpr = KH * KW * WIDTH
    # Four would not fit beside the accumulators of 8 slots.
    EACH: tl.constexpr = 2 if SLOTS == 8 and WORDS == 4 else WORDS
    CHUNK: tl.constexpr = 4 * EACH if EACH > 1 else 8
    i = tl.arange(0, WARPS * 32 * SLOTS)
    t, slot, g, first = place(i, WARPS, SLOTS)
    m = tl.minimum(first + slot * 8 + g, M - 1)
    first_n = tl.program_id(1) * 64
    group = 0
    if GROUPS > 1:
        group = first_n // (N // GROUPS)
    open_taps = i * 0
    class_at = i * 0
    if FLAT:
        image = m
        oh = m * 0
        ow = m * 0
        pixel = m * (GROUPS * WIDTH) + group * WIDTH
    else:
        image, oh, ow = pixel_of(m, OH, OW, OWM, OWS, OHM, OHS)
        ih0, iw0 = oh * SH - PT, ow * SW - PL
        pixel = ((image * H + ih0) * W + iw0) * (GROUPS * WIDTH) + group * WIDTH
        if PADDED:
            top, bottom = outside(ih0, H, KH, DH)
            left, right = outside(iw0, W, KW, DW)
            open_taps = taps_inside(top, bottom, left, right, KH, KW)
            if TOP + BOTTOM + LEFT + RIGHT > 0:
                class_at = N * border_class(top, bottom, left, right, BOTTOM, LEFT, RIGHT)
    n = first_n + 8 * (g // 2) + g % 2
    column = filters + n * TOTAL
    acc = (i * 0,) * 18
    if SLOTS == 8:  # the next words would not fit beside these accumulators
        for start in range(0, TOTAL, CHUNK):
            rows, tiles = fetch(
                words, pixel, open_taps, column, filters, n, N, start, t, W, DH, DW, SLOTS, EACH,
                CHUNK, GROUPS, WIDTH, KH, KW, PADDED, WHOLE)
            acc = multiply(rows, tiles, acc, SLOTS, CHUNK)
    elif LINES and KH > 1 and WIDTH % CHUNK == 0:
        for _ in range(KH):
            for start in tl.static_range(0, KW * WIDTH, CHUNK):
                rows, tiles = fetch(
                    words, pixel, open_taps, column, filters, n, N, start, t, W, DH, DW, SLOTS,
                    EACH, CHUNK, GROUPS, WIDTH, KH, KW, PADDED, WHOLE)
                acc = multiply(rows, tiles, acc, SLOTS, CHUNK)
            pixel += DH * W * (GROUPS * WIDTH)
            open_taps = open_taps >> KW
            column += KW * WIDTH
            filters += KW * WIDTH
    elif TOTAL <= UNROLLED * CHUNK:
        for start in tl.static_range(0, TOTAL, CHUNK):
            rows, tiles = fetch(
                words, pixel, open_taps, column, filters, n, N, start, t, W, DH, DW, SLOTS, EACH,
                CHUNK, GROUPS, WIDTH, KH, KW, PADDED, WHOLE)
            acc = multiply(rows, tiles, acc, SLOTS, CHUNK)
    else:
        rows, tiles = fetch(words, pixel, open_taps, column, filters, n, N, 0, t, W, DH, DW, SLOTS,
                            EACH, CHUNK, GROUPS, WIDTH, KH, KW, PADDED, WHOLE)
        for start in range(CHUNK, TOTAL, CHUNK):
            next_rows, next_tiles = fetch(
                words, pixel, open_taps, column, filters, n, N, start, t, W, DH, DW, SLOTS, EACH,
                CHUNK, GROUPS, WIDTH, KH, KW, PADDED, WHOLE)
            acc = multiply(rows, tiles, acc, SLOTS, CHUNK)
            rows, tiles = next_rows, next_tiles
        acc = multiply(rows, tiles, acc, SLOTS, CHUNK)

    t, slot, g, first = place(fence(i, SLOTS), WARPS, SLOTS)
    m = first + slot * 8 + g
    row_ok = m < M
    safe_m = tl.minimum(m, M - 1)
    base = -2 * acc[16]
    if residual is not None:
        SHORT: tl.constexpr = residual.dtype.element_ty.primitive_bitwidth == 16
        if RESIDUAL_WIDE:
            residual_at = safe_m * N
        else:
            residual_at = image * ron + oh * roh + ow * row
    if out is not None:
        TYPE: tl.constexpr = out.dtype.element_ty
        if OUT_WIDE:
            out_at = m * N
        else:
            out_at = image * oon + oh * ooh + ow * oow
    bits = i * 0
    for h in tl.static_range(4):
        if h > 0 and (SLOTS == 8 or h == 2):
            t = fence(t, SLOTS)
        n = first_n + 32 * (h // 2) + 4 * (h % 2) + 8 * t
        safe_n = n
        condition = row_ok.to(tl.int32)
        if EIGHTS and not WHOLE:
            safe_n = tl.minimum(n, N - 4)
            condition = condition & (n < N).to(tl.int32)
        if TOP + BOTTOM + LEFT + RIGHT > 0:
            correction = corrections(corr, class_at, safe_n, N, SLOTS, EIGHTS)
        else:
            correction = channels(corr, safe_n, N, SLOTS, EIGHTS)
        if scale is not None:
            scales = channels(scale, safe_n, N, SLOTS, EIGHTS)
        if bias is not None:
            biases = channels(bias, safe_n, N, SLOTS, EIGHTS)
        if slope is not None:
            if shift_in is not None:
                shifts_in = channels(shift_in, safe_n, N, SLOTS, EIGHTS)
            slopes = channels(slope, safe_n, N, SLOTS, EIGHTS)
            if shift_out is not None:
                shifts_out = channels(shift_out, safe_n, N, SLOTS, EIGHTS)
        if threshold is not None:
            lows = channels(threshold, safe_n, N, SLOTS, EIGHTS)
            highs = channels(threshold + N, safe_n, N, SLOTS, EIGHTS)
        elif sign_shift is not None:
            sign_shifts = channels(sign_shift, safe_n, N, SLOTS, EIGHTS)
        if residual is not None:
            if RESIDUAL_WIDE:
                if not SHORT:
                    added_words = load(residual + (residual_at + safe_n), SLOTS, 4)
                elif h % 2 == 0:
                    eight = n if WHOLE else tl.minimum(n, N - 8)
                    added_words = load(residual + (residual_at + eight), SLOTS, 4)
        if h % 2 == 0:
            halves = ()
        whole_words = ()
        for k in tl.static_range(4):
            ok = row_ok
            if not WHOLE:
                ok = row_ok & (n + k < N)
            dot = 4 * acc[4 * h + k] + (base + correction[k])
            if residual is None:
                added = None
            elif RESIDUAL_WIDE:
                if SHORT:
                    added = half_of(added_words[2 * (h % 2) + k // 2], k % 2 == 1,
                                    residual.dtype.element_ty)
                else:
                    added = added_words[k].to(tl.float32, bitcast=True)
            else:
                added = tl.load(residual + (residual_at + (n + k) * roc), mask=ok,
                                other=0.0).to(tl.float32)
            y = activate(dot.to(tl.float32), clamp_min, clamp_max,
                         scales[k] if scale is not None else None,
                         biases[k] if bias is not None else None, added,
                         shifts_in[k] if slope is not None and shift_in is not None else None,
                         slopes[k] if slope is not None else None,
                         shifts_out[k] if slope is not None and shift_out is not None else None)
            if out is not None:
                value = dot if TYPE.is_int() else y
                if not OUT_WIDE:
                    tl.store(out + (out_at + (n + k) * ooc), value.to(TYPE), mask=ok)
                elif TYPE.primitive_bitwidth == 32:
                    word = (value.to(tl.int32, bitcast=True),)
                    whole_words = whole_words + word  # type: ignore[assignment]
                elif k % 2 == 0:
                    before = value
                else:
                    word = (pair(before, value, TYPE),)
                    halves = halves + word  # type: ignore[assignment]
            if packed is not None:
                if threshold is not None:
                    bit = (dot >= lows[k]) & (dot <= highs[k])
                elif sign_shift is not None:
                    bit = ~(y + sign_shifts[k] < 0)
                else:
                    bit = ~(y < 0)
                if not WHOLE:
                    bit = bit & (n + k < N)
                bits |= bit.to(tl.int32) << (4 * h + k)
        if out is not None:
            if OUT_WIDE:
                if TYPE.primitive_bitwidth == 32:
                    store(out + (out_at + n), whole_words, condition, SLOTS)
                elif h % 2 == 1:
                    store(out + (out_at + (n - 4)), halves, condition, SLOTS)
    if packed is not None:
        width = (N + 31) // 32
        m = first + (slot // 4 * 4 + t) * 8 + g  # the row of four that the lane stores
        inside = (m < M).to(tl.int32)
        also = inside
        if not WHOLE:
            also = inside & (first_n // 32 + 1 < width).to(tl.int32)
        at = packed + (m * width + first_n // 32)
        KIND: tl.constexpr = (SLOTS // 8) * 2 + (1 if WHOLE else 0)
        tl.inline_asm_elementwise(
            STORE_SIGNS[KIND], STORE_SIGNS_IO[KIND], [bits, at.to(tl.int64), inside, also],
            dtype=tl.int32, is_pure=False, pack=SLOTS)
