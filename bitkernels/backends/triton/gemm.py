"""One contraction: prepares the tables of its inner product, launches its kernel."""

from __future__ import annotations

from typing import cast

import torch
import triton

from bitkernels.backends.triton import configs, elementwise, tuning
from bitkernels.backends.triton.contraction import filter_kernel, window_kernel
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
        tables = prepare(words, filters, channels, groups, geometry, pad, pad_value, rows, ptx)
        common |= dict(**tables, BORDERS=tables["corr"].shape[0], PADDED=any(pad))
    if inner == "int8":
        words, filters, depth = words.view(torch.int8), filters.view(torch.int8), 4 * depth
        common |= dict(PTX=ptx)
    elif inner == "b1":
        common |= {k: v.float() for k, v in vectors.items() if v is not None}

    def grid(tile):
        return triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(cout, tile.get("BLOCK_N", 64))

    tuning.launch(inner, family, grid, words=words, filters=filters, GROUPS=groups, KH=kh, KW=kw,
                  WIDTH=depth, size_class=tuning.size_class(rows), enable_fp_fusion=False,
                  **common)


def prepare(words, filters, channels, groups, geometry, pad, pad_value, rows, ptx) -> dict:
    height, width, oh, ow, sh, sw, top, left, dh, dw = geometry
    cout, kh, kw, depth = filters.shape
    border = (0, 0, 0, 0)
    if pad_value != -1:  # with -1 the taps outside are plain clear bits
        border = (*outside(height, oh, kh, sh, top, dh), *outside(width, ow, kw, sw, left, dw))
    classes = 1
    for taps in border:
        classes *= taps + 1
    block_k = min(triton.next_power_of_2(depth), 32)
    pa, labels = words.new_empty((rows, groups)), words.new_empty((rows if classes > 1 else 1,))
    corr = words.new_empty((classes, cout))
    window_kernel[(triton.cdiv(rows, 128), groups)](
        words, pa, labels, rows, *geometry, *border, GROUPS=groups, WIDTH=depth, KH=kh,
        KW=kw, PTX=ptx, BLOCK_M=128, BLOCK_K=block_k, WIDE=False,
        num_warps=4, enable_fp_fusion=False)
    block_b = min(triton.next_power_of_2(classes), 64)
    filter_kernel[(triton.cdiv(cout, 32), triton.cdiv(classes, block_b))](
        filters, corr, cout, classes, channels // groups, *border[1:], WIDTH=depth, KH=kh, KW=kw,
        PAD_VALUE=max(pad_value, 0), PTX=ptx, BLOCK_B=block_b, BLOCK_N=32, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=False)
    return dict(pa=pa, border=labels, corr=corr)
