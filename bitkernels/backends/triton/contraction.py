"""The dot products of packed_conv2d and packed_linear, with their epilogue, as implicit GEMM.

M runs over output pixels, N over output channels, K over (tap, word of the pixel); a linear layer
is the 1 x 1 convolution of 1 x 1 images. Nothing is unfolded in memory. Three inner products:

  popc   popcount of a xor w, any grouping, nothing prepared: small shapes, small groups
  int8   bit i of every byte as {0, 1} in int8, eight `tl.dot` for eight bits
  b1     the 1-bit tensor core (b1.py)

int8 and b1 count popc(a and w), and then
  dot = corr[border, n] - 2 pa[m] + 4 popc(a and w)
  pa    bits set in the window of pixel m, in the group of n; border pixels' missing taps count none
  corr  sum over the window's taps inside the image of (channels - 2 popc(w[tap, n])), minus
        pad_value times the same sum over the taps outside
A border class is how many rows and columns of taps fall outside at each of the four sides, so corr
is a small table. `window_kernel` and `filter_kernel` prepare both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.jit import (
    bit_plane,
    block_index,
    epilogue,
    pack_signs,
    popcount,
    sign_bits,
)


@triton.jit
def outside(first, size, K: tl.constexpr, step):
    """Taps before and past the image, of K taps at first, first + step, ..."""
    before = tl.minimum((tl.maximum(-first, 0) + step - 1) // step, K)
    until = tl.minimum((tl.maximum(size - first, 0) + step - 1) // step, K)
    return before, K - until


@triton.jit
def border_class(top, bottom, left, right, BOTTOM: tl.constexpr, LEFT: tl.constexpr,
                 RIGHT: tl.constexpr):
    """Number of the class of windows with so many taps outside, of BOTTOM.. at most."""
    return ((top * (BOTTOM + 1) + bottom) * (LEFT + 1) + left) * (RIGHT + 1) + right


@triton.jit
def window_kernel(words, pa, border, M, H, W, OH, OW, SH, SW, PT, PL, DH, DW,
                  TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                  GROUPS: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                  PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                  WIDE: tl.constexpr):
    """pa of every output pixel and group, border class of every output pixel.

    TOP.. are the largest counts of taps outside, of these windows exactly; WIDTH the words of a
    group. Program axis 1: group.
    """
    group = tl.program_id(1)
    m = block_index(BLOCK_M, WIDE)
    ok = m < M
    ow, line = m % OW, m // OW
    oh, n = line % OH, line // OH
    ih0, iw0 = oh * SH - PT, ow * SW - PL
    k = tl.arange(0, BLOCK_K)
    count = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    for tap in range(KH * KW):
        ih, iw = ih0 + (tap // KW) * DH, iw0 + (tap % KW) * DW
        inside = ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        at = words + ((n * H + ih) * W + iw) * (GROUPS * WIDTH) + group * WIDTH
        for start in range(0, WIDTH, BLOCK_K):
            a = tl.load(at[:, None] + (start + k)[None, :],
                        mask=inside[:, None] & (start + k < WIDTH)[None, :], other=0)
            count += popcount(a, PTX)
    tl.store(pa + m * GROUPS + group, tl.sum(count, axis=1), mask=ok)
    if TOP + BOTTOM + LEFT + RIGHT > 0:
        top, bottom = outside(ih0.to(tl.int32), H, KH, DH)
        left, right = outside(iw0.to(tl.int32), W, KW, DW)
        label = border_class(top, bottom, left, right, BOTTOM, LEFT, RIGHT)
        tl.store(border + m, label, mask=ok)


@triton.jit
def filter_kernel(filters, corr, N, BORDERS, CHANNELS, BOTTOM: tl.constexpr, LEFT: tl.constexpr,
                  RIGHT: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                  PAD_VALUE: tl.constexpr, PTX: tl.constexpr, BLOCK_B: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """corr[border, n]; one program a block of border classes and of filters."""
    label = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    right, rest = label % (RIGHT + 1), label // (RIGHT + 1)
    left, rest = rest % (LEFT + 1), rest // (LEFT + 1)
    bottom, top = rest % (BOTTOM + 1), rest // (BOTTOM + 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < N
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
    for tap in tl.range(KH * KW, loop_unroll_factor=9):  # loads of several taps at once
        count = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        at = filters + (n.to(tl.int64) * (KH * KW) + tap) * WIDTH
        for start in range(0, WIDTH, BLOCK_K):
            w = tl.load(at[:, None] + (start + k)[None, :],
                        mask=ok[:, None] & (start + k < WIDTH)[None, :], other=0)
            count += popcount(w, PTX)
        kh, kw = tap // KW, tap % KW
        inside = (kh >= top) & (kh < KH - bottom) & (kw >= left) & (kw < KW - right)
        value = CHANNELS - 2 * tl.sum(count, axis=1)
        total += value[None, :] * tl.where(inside, 1, -PAD_VALUE)[:, None]
    tl.store(corr + label[:, None] * N + n[None, :], total,
             mask=(label < BORDERS)[:, None] & ok[None, :])


@triton.jit
def finish(dot, m, n, N, OH, OW, out, packed, residual, ron, roc, roh, row, oon, ooc, ooh, oow,
           clamp_min, clamp_max, scale, bias, shift_in, slope, shift_out, sign_shift, threshold,
           M, PACK_ROWS: tl.constexpr, PACK_COLS: tl.constexpr):
    """Epilogue and stores of a tile: dot (BLOCK_M, BLOCK_N), m (BLOCK_M,), n (BLOCK_N,);
    offsets are computed in the type of m."""
    row_ok, cols = m < M, n[None, :]
    col_ok = cols < N
    ok = row_ok[:, None] & col_ok
    w, line = m % OW, m // OW
    h, image = line % OH, line // OH
    wide_n = n.to(m.dtype)[None, :]
    if residual is not None:
        at = image * ron + h * roh + w * row
        added = tl.load(residual + at[:, None] + wide_n * roc, mask=ok, other=0.0)
    else:
        added = None
    y = epilogue(dot, cols, col_ok, added, clamp_min, clamp_max, scale, bias, shift_in, slope,
                 shift_out)
    if out is not None:
        at = out + (image * oon + h * ooh + w * oow)[:, None] + wide_n * ooc
        if out.dtype.element_ty.is_int():
            tl.store(at, dot.to(out.dtype.element_ty), mask=ok)
        else:
            tl.store(at, y.to(out.dtype.element_ty), mask=ok)
    if packed is not None:
        bits = sign_bits(y, dot, cols, col_ok, sign_shift, threshold, N)
        word = tl.program_id(1) * (PACK_COLS // 32) + tl.arange(0, PACK_COLS // 32)
        width = (N + 31) // 32
        tl.store(packed + m[:, None] * width + word[None, :],
                 pack_signs(bits, PACK_ROWS, PACK_COLS),
                 mask=row_ok[:, None] & (word < width)[None, :])


@triton.jit(do_not_specialize=["size_class"])
def popc_kernel(words, filters, out, packed, residual, clamp_min, clamp_max, scale, bias, shift_in,
                slope, shift_out, sign_shift, threshold, M, N, H, W, OH, OW, SH, SW, PT, PL, DH, DW,
                ron, roc, roh, row, oon, ooc, ooh, oow, size_class,
                CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
                PIXEL: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                PAD_VALUE: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """CHANNELS, OUT_CHANNELS and WIDTH (words) are a group's, PIXEL is a pixel's words.

    A group's channels may start inside a word: its words are then put together from two.
    size_class is not used here: tuning depends on it.
    """
    m = block_index(BLOCK_M, WIDE)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = m < M, n < N
    ow, line = m % OW, m // OW
    oh, image = line % OH, line // OH
    ih0, iw0 = oh * SH - PT, ow * SW - PL
    if GROUPS > 1:
        first_bit = (n // OUT_CHANNELS * CHANNELS)[None, :]
    else:
        first_bit = tl.zeros([1, 1], tl.int32)
    shift = first_bit % 32
    filter_at = filters + n.to(m.dtype) * (KH * KW * WIDTH)
    differ = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    valid = tl.zeros([BLOCK_M], tl.int32)
    for tap in range(KH * KW):
        ih, iw = ih0 + (tap // KW) * DH, iw0 + (tap % KW) * DW
        inside = row_ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        pixel = words + ((image * H + ih) * W + iw)[:, None] * PIXEL
        if PAD_VALUE == 0:
            counted = tl.where(inside, -1, 0)
            valid += tl.where(inside, CHANNELS, 0)
        for j in range(WIDTH):
            word = first_bit // 32 + j
            a = tl.load(pixel + word, mask=inside[:, None] & (word < PIXEL), other=0)
            if GROUPS > 1 and CHANNELS % 32 != 0:
                low = a.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
                high = tl.load(pixel + word + 1, mask=inside[:, None] & (word + 1 < PIXEL), other=0)
                # Two shifts for 32 - shift: a shift by all 32 bits is undefined.
                a = low.to(tl.int32, bitcast=True) | ((high << (31 - shift)) << 1)
            tail = tl.where(j * 32 + 32 > CHANNELS, (1 << (CHANNELS % 32)) - 1, -1)
            if CHANNELS % 32 != 0:
                a &= tail
            if PAD_VALUE == 1:
                a = tl.where(inside[:, None], a, tail if CHANNELS % 32 != 0 else -1)
            w = tl.load(filter_at + tap * WIDTH + j, mask=col_ok, other=0)
            if PAD_VALUE == 0:
                differ += popcount((a ^ w[None, :]) & counted[:, None], PTX)
            else:
                differ += popcount(a ^ w[None, :], PTX)
    if PAD_VALUE == 0:
        dot = valid[:, None] - 2 * differ
    else:
        dot = CHANNELS * KH * KW - 2 * differ
    finish(dot, m, n, N, OH, OW, out, packed, residual, ron, roc, roh, row, oon, ooc, ooh, oow,
           clamp_min, clamp_max, scale, bias, shift_in, slope, shift_out, sign_shift, threshold, M,
           BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["size_class"])
def int8_kernel(words, filters, out, packed, residual, clamp_min, clamp_max, scale, bias, shift_in,
                slope, shift_out, sign_shift, threshold, pa, border, corr, M, N, H, W, OH, OW, SH,
                SW, PT, PL, DH, DW, ron, roc, roh, row, oon, ooc, ooh, oow, size_class,
                BORDERS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, KH: tl.constexpr,
                KW: tl.constexpr, PADDED: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """words and filters are bytes here, WIDTH those of a group of a pixel, or of a filter's tap.

    With GROUPS > 1, BLOCK_N divides the output channels of a group. Every tensor has fewer than
    2^31 elements and bytes of words. size_class is not used here: tuning depends on it.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = m < M, n < N
    ow, line = m % OW, m // OW
    oh, image = line % OH, line // OH
    ih0, iw0 = oh * SH - PT, ow * SW - PL
    PIXEL: tl.constexpr = GROUPS * WIDTH
    group = 0
    if GROUPS > 1:
        group = tl.program_id(1) * BLOCK_N // (N // GROUPS)
    pixel = words + ((image * H + ih0) * W + iw0) * PIXEL + group * WIDTH
    filter_at = filters + n * (KH * KW * WIDTH)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    TOTAL: tl.constexpr = KH * KW * WIDTH
    for start in range(0, TOTAL, BLOCK_K):
        at = start + k
        if WIDTH % BLOCK_K == 0:
            tap = start // WIDTH
            kh, kw = tap // KW, tap % KW
            inside = row_ok
            if PADDED:
                ih, iw = ih0 + kh * DH, iw0 + kw * DW
                inside = inside & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            step = (kh * DH * W + kw * DW) * PIXEL + start % WIDTH
            a = tl.load(pixel[:, None] + (step + k)[None, :], mask=inside[:, None], other=0)
        else:
            tap = at // WIDTH
            kh, kw = tap // KW, tap % KW
            ok = row_ok[:, None] & (at < TOTAL)[None, :]
            if PADDED:
                ih, iw = ih0[:, None] + (kh * DH)[None, :], iw0[:, None] + (kw * DW)[None, :]
                ok = ok & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            step = (kh * DH * W + kw * DW) * PIXEL + at % WIDTH
            a = tl.load(pixel[:, None] + step[None, :], mask=ok, other=0)
        w = tl.load(filter_at[None, :] + at[:, None],
                    mask=col_ok[None, :] & (at < TOTAL)[:, None], other=0)
        for bit in tl.static_range(8):
            acc = tl.dot(bit_plane(a, bit, PTX), bit_plane(w, bit, PTX), acc, out_dtype=tl.int32)
    # Never past the end: a row or column outside reads the last one's, and is not stored.
    safe_m, safe_n = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    base = (-2 * tl.load(pa + safe_m * GROUPS + group))[:, None]
    if BORDERS > 1:
        base += tl.load(corr + (tl.load(border + safe_m) * N)[:, None] + safe_n[None, :])
    else:
        base += tl.load(corr + safe_n)[None, :]
    finish(base + 4 * acc, m, n, N, OH, OW, out, packed, residual, ron, roc, roh, row, oon, ooc,
           ooh, oow, clamp_min, clamp_max, scale, bias, shift_in, slope, shift_out, sign_shift,
           threshold, M, BLOCK_M, BLOCK_N)
