"""One contraction: prepares the tables of its inner product, launches its kernel."""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
import triton

from bitkernels.backends.triton import configs, elementwise, tuning
from bitkernels.backends.triton.contraction import filter_kernel, window_kernel
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.plan import VECTORS


def outside(size: int, out: int, kernel: int, stride: int, pad: int, step: int) -> tuple[int, int]:
    """The most taps that any window has before and past the image along one axis."""
    last = (out - 1) * stride - pad
    until = min(-(-max(size - last, 0) // step), kernel)
    return min(-(-pad // step), kernel), kernel - until


def contract(inner: str, words, filters, channels, stride, pad, dilation, groups, pad_value,
             out_size, out=None, packed=None, residual=None, clamp_min=None, clamp_max=None,
             threshold=None, **vectors):
    """words (N, H, W, words), filters (Cout, kh, kw, words); out and residual (N, Cout, OH, OW)."""
    family = configs.family(words.device)
    ptx = configs.inline_ptx(family)
    images, height, width, pixel = words.shape
    cout, kh, kw, depth = filters.shape
    oh, ow = out_size
    rows = images * oh * ow
    if rows == 0:
        return
    if inner != "popc" and elementwise.wide(residual):  # its offsets would not fit int32
        residual = cast(torch.Tensor, residual).contiguous()
    flat = height * width * kh * kw * oh * ow == 1
    writes = "block" if residual is not None else "packed" if out is None else "real"
    size = configs.Size(rows, cout, kh * kw, depth, writes, flat)
    geometry = (height, width, oh, ow, *stride, pad[0], pad[2], *dilation)
    strides = [(0,) * 4 if t is None else (t.stride(0), t.stride(1), t.stride(2), t.stride(3))
               for t in (residual, out)]
    vectors = {k: None if vectors.get(k) is None else vectors[k].contiguous() for k in VECTORS}
    if threshold is not None:
        threshold = threshold.contiguous()
    common = dict(out=out, packed=packed, residual=residual, clamp_min=clamp_min,
                  clamp_max=clamp_max, threshold=threshold, **vectors, M=rows, N=cout)
    common |= zip(("H", "W", "OH", "OW", "SH", "SW", "PT", "PL", "DH", "DW"), geometry,
                  strict=True)
    common |= zip(("ron", "roc", "roh", "row", "oon", "ooc", "ooh", "oow"),
                  (*strides[0], *strides[1]), strict=True)
    if inner == "popc":
        common |= dict(CHANNELS=channels // groups, OUT_CHANNELS=cout // groups, PIXEL=pixel,
                       PAD_VALUE=pad_value, PTX=ptx,
                       WIDE=elementwise.wide(words, filters, out, packed, residual))
    else:
        border = borders(geometry, pad, pad_value, kh, kw)
        corr = corrections(filters, channels, groups, border, pad_value, ptx)
        common |= dict(corr=corr, PADDED=any(pad))
    if inner == "int8":
        pa, labels = windows(words, groups, geometry, border, kh, kw, depth, rows, ptx)
        words, filters = elementwise.as_bytes(words), elementwise.as_bytes(filters)
        depth *= 4
        common |= dict(pa=pa, border=labels, BORDERS=corr.shape[0], PTX=ptx)
    elif inner == "b1":
        words, filters = aligned(words), aligned(filters)
        common |= {k: aligned(v.float()) for k, v in vectors.items() if v is not None}
        if threshold is not None:
            common |= dict(threshold=aligned(threshold))
        common |= zip(("OWM", "OWS", "OHM", "OHS"), (*reciprocal(ow), *reciprocal(oh)),
                      strict=True)
        common |= zip(("TOP", "BOTTOM", "LEFT", "RIGHT"), border, strict=True)
        common |= dict(FLAT=flat, WHOLE=cout % 64 == 0,
                       EIGHTS=cout % 8 == 0, OUT_WIDE=wide(out), RESIDUAL_WIDE=wide(residual),
                       WORDS=configs.load_words(depth))

    def grid(tile):
        return triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(cout, tile.get("BLOCK_N", 64))

    tuning.launch(inner, family, size, grid, words=words, filters=filters, GROUPS=groups, KH=kh,
                  KW=kw, WIDTH=depth, size_class=tuning.size_class(rows), **common)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """The tensor at an address that 16 divides."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def wide(t: torch.Tensor | None) -> bool:
    """Whether 8 channels are neighbours in memory, at an address that 16 divides, and pixels follow
    one another."""
    return (t is not None and t.shape[1] % 8 == 0 and t.data_ptr() % 16 == 0
            and t.permute(0, 2, 3, 1).is_contiguous())


@functools.cache
def reciprocal(d: int) -> tuple[int, int]:
    """(magic, shift) as int32: n // d = (umulhi(n, magic) + n) >> shift for 0 <= n < 2^31.

    Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994, figure 4.1.
    """
    shift = (d - 1).bit_length()
    magic = (2**32 * (2**shift - d)) // d + 1
    return magic - 2**32 if magic >= 2**31 else magic, shift


def borders(geometry, pad, pad_value: int, kh: int, kw: int) -> tuple[int, int, int, int]:
    """The most taps outside, above, below, left and right, that are not plain clear bits."""
    height, width, oh, ow, sh, sw, top, left, dh, dw = geometry
    if pad_value == -1 or not any(pad):
        return 0, 0, 0, 0
    return *outside(height, oh, kh, sh, top, dh), *outside(width, ow, kw, sw, left, dw)


def windows(words, groups, geometry, border, kh, kw, depth, rows, ptx):
    """Set bits of every window and group (pixels, groups), border class of every window."""
    pa = words.new_empty((rows, groups))
    labels = words.new_empty((rows if any(border) else 1,))
    top, bottom, left, right = border
    launch(window_kernel, (-(-rows // 128), groups), (words, pa, labels, rows, *geometry), (4,),
           TOP=top, BOTTOM=bottom, LEFT=left, RIGHT=right, GROUPS=groups, WIDTH=depth, KH=kh,
           KW=kw, PTX=ptx, BLOCK_M=128, BLOCK_K=min(triton.next_power_of_2(depth), 32), WIDE=False)
    return pa, labels


def corrections(filters, channels, groups, border, pad_value, ptx):
    """corr of contraction.py, (border classes, filters)."""
    cout, kh, kw, depth = filters.shape
    classes = math.prod(taps + 1 for taps in border)
    corr = filters.new_empty((classes, cout))
    block_b = min(triton.next_power_of_2(classes), 64)
    _, bottom, left, right = border
    launch(filter_kernel, (-(-cout // 32), -(-classes // block_b)),
           (filters, corr, cout, classes, channels // groups), (4,), BOTTOM=bottom, LEFT=left,
           RIGHT=right, WIDTH=depth, KH=kh, KW=kw, PAD_VALUE=max(pad_value, 0), PTX=ptx,
           BLOCK_B=block_b, BLOCK_N=32, BLOCK_K=min(triton.next_power_of_2(depth), 32))
    return corr
