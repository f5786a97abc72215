"""max_pool2d_with_offsets and its backward, one launch each, without atomics.

A program has a rectangle of one image and a block of its channels, so that what neighbouring
windows share is read from memory once and found in the cache again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import configs, passes
from bitkernels.backends.triton.elementwise import wide
from bitkernels.backends.triton.launch import launch
from bitkernels.ops.max_pool2d_with_offsets import fake, fake_backward

# Taps of a window that are written out one by one; of more, a loop counts.
UNROLLED = 25
# Of the backward's blocks: their pixels, of which a thread has all, and these times the windows.
PIXELS, PAIRS = 9, 64
NOWHERE = tl.constexpr(255)
# `tap_of` on two elements of 16 bits in a register, without predicates, of which there are seven.
_TAP = """{ .reg .b32 wins, nan;
set.gt.u32.TYPE wins, $2, $3;
set.nan.u32.TYPE nan, $2, $2;
or.b32 wins, wins, nan;
lop3.b32 $0, wins, $2, $3, 0xCA;
lop3.b32 $1, wins, $5, $4, 0xCA; }"""
_TAP_FP16 = tl.constexpr(_TAP.replace("TYPE", "f16x2"))
_TAP_BF16 = tl.constexpr(_TAP.replace("TYPE", "bf16x2"))


@triton.jit
def place(tiles_h, tiles_w, blocks, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
          BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """(image, rows, columns, channels) of this program."""
    p = tl.program_id(0)
    row, image = p // tiles_w % tiles_h, p // tiles_w // tiles_h
    r = tl.arange(0, TILE_H * TILE_W)
    y = row * TILE_H + r // TILE_W
    x = p % tiles_w * TILE_W + r % TILE_W
    c = image % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n = image // blocks
    if WIDE:
        return n.to(tl.int64), y.to(tl.int64), x.to(tl.int64), c.to(tl.int64)
    else:
        return n, y, x, c


@triton.jit
def tap_of(top, left, H, W, best, number, input, c, ok, sc, sh, sw, tap, KW: tl.constexpr,
           DH: tl.constexpr, DW: tl.constexpr, PACKED: tl.constexpr):
    """The maximum and its number so far, and one tap more: a NaN wins, also against another."""
    y, x = top + tap // KW * DH, left + tap % KW * DW
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    v = tl.load(input + ((y * sh + x * sw)[:, None] + (c * sc)[None, :]), mask=inside[:, None] & ok,
                other=-float("inf"))
    if PACKED:
        asm: tl.constexpr = _TAP_FP16 if v.dtype == tl.float16 else _TAP_BF16
        return tl.inline_asm_elementwise(
            asm, "=&r,=&r,r,r,r,r", [v, best, number, tl.full(v.shape, tap, tl.int16)],
            dtype=(v.dtype, tl.int16), is_pure=True, pack=2)
    else:
        v = v.to(tl.float32)
        wins = (v > best) | (v != v)
        return tl.where(wins, v, best), tl.where(wins, tap, number)


@triton.jit
def max_pool2d_kernel(input, out, offsets, H, W, OH, OW, channels, tiles_h, tiles_w, blocks,
                      sn, sc, sh, sw, on, oc, oh, ow, KH: tl.constexpr, KW: tl.constexpr,
                      SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
                      DH: tl.constexpr, DW: tl.constexpr, UNROLL: tl.constexpr,
                      PACKED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                      BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    n, y, x, c = place(tiles_h, tiles_w, blocks, TILE_H, TILE_W, BLOCK_C, WIDE)
    ok = ((y < OH) & (x < OW))[:, None] & (c < channels)[None, :]
    top, left = y * SH - PT, x * SW - PL
    # The first tap in the image, whose number remains where all are -inf.
    row, column = (tl.maximum(-top, 0) + DH - 1) // DH, (tl.maximum(-left, 0) + DW - 1) // DW
    some = (row < KH) & (top + row * DH < H) & (column < KW) & (left + column * DW < W)
    kind: tl.constexpr = tl.int16 if PACKED else tl.int32
    first = tl.where(some, row * KW + column, NOWHERE).to(kind)
    number = tl.zeros([TILE_H * TILE_W, BLOCK_C], kind) + first[:, None]
    best = tl.full([TILE_H * TILE_W, BLOCK_C], -float("inf"),
                   input.dtype.element_ty if PACKED else tl.float32)
    input += n * sn
    if UNROLL:
        for tap in tl.static_range(KH * KW):
            best, number = tap_of(top, left, H, W, best, number, input, c, ok, sc, sh, sw, tap, KW,
                                  DH, DW, PACKED)
    else:
        for tap in range(KH * KW):
            best, number = tap_of(top, left, H, W, best, number, input, c, ok, sc, sh, sw, tap, KW,
                                  DH, DW, False)
    at = (y * oh + x * ow)[:, None] + (c * oc)[None, :]
    tl.store(out + n * on + at, best.to(out.dtype.element_ty), mask=ok)
    tl.store(offsets + n * on + at, number.to(tl.uint8), mask=ok)


@triton.jit
def window_of(grad, offsets, n, y, x, c, OH, OW, channels, gn, gc, gh, gw, on, oc, oh, ow):
    """A window's gradient in float32 and its number; 0 and 255 of none."""
    ok = ((y >= 0) & (y < OH) & (x >= 0) & (x < OW))[:, None] & (c < channels)[None, :]
    number = tl.load(offsets + n * on + ((y * oh + x * ow)[:, None] + (c * oc)[None, :]), mask=ok,
                     other=255)
    g = tl.load(grad + n * gn + ((y * gh + x * gw)[:, None] + (c * gc)[None, :]), mask=ok, other=0)
    return g.to(tl.float32), number.to(tl.int32)


@triton.jit
def with_window(total, grad, offsets, n, y, x, c, OH, OW, channels, gn, gc, gh, gw, on, oc, oh, ow,
                FAR_H: tl.constexpr, FAR_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
                DH: tl.constexpr, DW: tl.constexpr):
    """A pixel's sum and that of a window whose first tap is so far before it."""
    if (FAR_H % DH == 0 and FAR_H // DH < KH) and (FAR_W % DW == 0 and FAR_W // DW < KW):
        g, number = window_of(grad, offsets, n, y, x, c, OH, OW, channels, gn, gc, gh, gw,
                              on, oc, oh, ow)
        return total + tl.where(number == FAR_H // DH * KW + FAR_W // DW, g, 0.0)
    else:
        return total


@triton.jit
def max_pool2d_backward_blocks_kernel(
        grad, offsets, out, H, W, OH, OW, channels, tiles_h, tiles_w, blocks, gn, gc, gh, gw,
        on, oc, oh, ow, sn, sc, sh, sw, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
        SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
        TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """A thread has SH x SW pixels, which the same windows contain, each at taps that are known when
    the kernel is compiled. The windows' loads are the same expressions for each pixel, and all
    before the first store: the compiler makes one of them."""
    n, y, x, c = place(tiles_h, tiles_w, blocks, TILE_H, TILE_W, BLOCK_C, WIDE)
    sums = ()
    for pixel in tl.static_range(SH * SW):
        total = tl.zeros([TILE_H * TILE_W, BLOCK_C], tl.float32)
        for back_h in tl.static_range((KH - 1) * DH // SH, -1, -1):
            for back_w in tl.static_range((KW - 1) * DW // SW, -1, -1):
                total = with_window(
                    total, grad, offsets, n, y - back_h, x - back_w, c, OH, OW, channels,
                    gn, gc, gh, gw, on, oc, oh, ow, pixel // SW + back_h * SH,
                    pixel % SW + back_w * SW, KH, KW, DH, DW)
        sums = sums + (total,)  # type: ignore[assignment]
    out += n * sn
    for pixel in tl.static_range(SH * SW):
        h, w = y * SH + pixel // SW - PT, x * SW + pixel % SW - PL
        ok = ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & (c < channels)[None, :]
        tl.store(out + ((h * sh + w * sw)[:, None] + (c * sc)[None, :]),
                 sums[pixel].to(out.dtype.element_ty), mask=ok)


@triton.jit
def max_pool2d_backward_kernel(
        grad, offsets, out, H, W, OH, OW, channels, tiles_h, tiles_w, blocks, gn, gc, gh, gw,
        on, oc, oh, ow, sn, sc, sh, sw, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
        SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
        TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """A thread has single pixels: of planes, whose neighbours a store takes together, and of
    windows that are many."""
    n, y, x, c = place(tiles_h, tiles_w, blocks, TILE_H, TILE_W, BLOCK_C, WIDE)
    WINDOWS_W: tl.constexpr = (KW - 1) * DW // SW + 1
    WINDOWS: tl.constexpr = ((KH - 1) * DH // SH + 1) * WINDOWS_W
    total = tl.zeros([TILE_H * TILE_W, BLOCK_C], tl.float32)
    for window in range(WINDOWS - 1, -1, -1):
        h, w = (y + PT) // SH - window // WINDOWS_W, (x + PL) // SW - window % WINDOWS_W
        far_h, far_w = y + PT - h * SH, x + PL - w * SW
        # 254 is the last number: 256 is that of no tap.
        tap = tl.where((far_h % DH == 0) & (far_h // DH < KH) & (far_w % DW == 0)
                       & (far_w // DW < KW), far_h // DH * KW + far_w // DW, 256)
        g, number = window_of(grad, offsets, n, h, w, c, OH, OW, channels, gn, gc, gh, gw,
                              on, oc, oh, ow)
        total += tl.where(number == tap[:, None], g, 0.0)
    ok = ((y < H) & (x < W))[:, None] & (c < channels)[None, :]
    tl.store(out + n * sn + ((y * sh + x * sw)[:, None] + (c * sc)[None, :]),
             total.to(out.dtype.element_ty), mask=ok)


def _tile(name: str, out, height: int, width: int):
    """(grid, (tiles by height, by width, blocks of channels), TILE_H, TILE_W, BLOCK_C) of a tensor
    in an image's memory format, and of so many rows and columns to share."""
    size = 1 if out.element_size() == 2 else 2  # as many bytes a thread of every type
    if out.stride(1) == 1:
        rows, columns = passes.tile(name, 1, out.shape[1])
        rows = max(rows // size, 1)
        tile_w = 1 << (rows.bit_length() // 2)  # near to a square, whose neighbours share least
    else:
        rows, columns = passes.PASSES[name].elements // size, 1
        tile_w = min(1 << (width - 1).bit_length(), rows, 64)
    counts = -(-height * tile_w // rows), -(-width // tile_w), -(-out.shape[1] // columns)
    grid = out.shape[0] * counts[0] * counts[1] * counts[2], 1
    return grid, counts, rows // tile_w, tile_w, columns


def _window(kernel, stride, padding, dilation) -> dict[str, int]:
    """The constants of both directions' kernels."""
    return dict(zip(("KH", "KW", "SH", "SW", "PT", "PL", "DH", "DW"),
                    (*kernel, *stride, *padding, *dilation), strict=True))


def _compares_pairs(family: str, dtype: torch.dtype) -> bool:
    """Whether a GPU compares two elements of a type by one instruction."""
    if not configs.inline_ptx(family) or dtype not in (torch.float16, torch.bfloat16):
        return False
    return dtype == torch.float16 or int(family.removeprefix("sm")) >= 90


def max_pool2d_with_offsets(input, kernel, stride, padding, dilation, ceil_mode):
    out, offsets = fake(input, kernel, stride, padding, dilation, ceil_mode)
    if out.numel():
        name, size = "max_pool2d", out.shape[2:]
        grid, counts, tile_h, tile_w, columns = _tile(name, out, *size)
        unroll = kernel[0] * kernel[1] <= UNROLLED
        packed = unroll and _compares_pairs(configs.family(input.device), input.dtype)
        launch(max_pool2d_kernel, grid,
               (input, out, offsets, *input.shape[2:], *size, input.shape[1], *counts,
                *input.stride(), *out.stride()), (passes.PASSES[name].warps,),
               **_window(kernel, stride, padding, dilation), UNROLL=unroll, PACKED=packed,
               TILE_H=tile_h, TILE_W=tile_w, BLOCK_C=columns, WIDE=wide(input, out))
    return out, offsets


def max_pool2d_with_offsets_backward(grad, offsets, input_size, kernel, stride, padding, dilation,
                                     ceil_mode):
    out = fake_backward(grad, offsets, input_size)
    if not out.numel():
        return out
    name, size = "max_pool2d_backward", out.shape[2:]
    pixels, windows = stride[0] * stride[1], math.prod(
        (k - 1) * d // s + 1 for k, d, s in zip(kernel, dilation, stride, strict=True))
    blocks = out.stride(1) == 1 and pixels <= PIXELS and pixels * windows <= PAIRS
    chosen = max_pool2d_backward_blocks_kernel if blocks else max_pool2d_backward_kernel
    if blocks:  # of SH x SW pixels, the first one of padding
        size = tuple((n + p - 1) // s + 1 for n, p, s in zip(size, padding, stride, strict=True))
    grid, counts, tile_h, tile_w, columns = _tile(name, out, *size)
    launch(chosen, grid,
           (grad, offsets, out, *out.shape[2:], *grad.shape[2:], out.shape[1], *counts,
            *grad.stride(), *offsets.stride(), *out.stride()), (passes.PASSES[name].warps,),
           **_window(kernel, stride, padding, dilation), TILE_H=tile_h, TILE_W=tile_w,
           BLOCK_C=columns, WIDE=wide(grad, offsets, out))
    return out
