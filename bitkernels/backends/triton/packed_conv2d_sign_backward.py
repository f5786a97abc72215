"""packed_conv2d_sign_backward: a convolution on the tensor core, of a gradient with the signs of a
weight, in 16 bits or float8.

Rows are pixels of the input, columns its channels. Summed over are taps and output channels, which
lie next to each other in the gradient and in the signs, as the tensor core on float8 wants them.
Hopper's adds in few bits of mantissa, so each 128 products or less go to a sum in float32. Loads go
through the L1 cache, where a tile's pixels stay for all taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitkernels.backends.triton import configs, sums
from bitkernels.backends.triton.jit import vector
from bitkernels.backends.triton.launch import launch
from bitkernels.backends.triton.plan import COLUMNS, ROWS
from bitkernels.backends.triton.residual_block import rows_of
from bitkernels.backends.triton.sign_backward import ESTIMATORS, IDENTITY, estimator_grad
from bitkernels.ops.packed_conv2d_sign_backward import fake

WARPS, STAGES = 8, 3
REGISTERS = 128  # of narrow tiles on Hopper, at most: two programs on a multiprocessor
BYTES = 128  # of a tile's row: output channels
# Of Triton that lets copies of 16 bytes pass by the L1 cache whatever is asked for. There they are
# of 8 bytes.
OLD = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.jit
def unpack_filters_kernel(words, scale, signs, outputs, channels, width, taps,
                          BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr):
    """words (outputs, taps, width) to signs (taps, channels, outputs), times scale."""
    tap = tl.program_id(0) % taps
    k = (tl.program_id(0) // taps) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_W * 32 + tl.arange(0, BLOCK_W * 32)
    ok = (c < channels)[:, None] & (k < outputs)[None, :]
    at = (k * taps + tap)[None, :] * width + (c // 32)[:, None]
    bit = (tl.load(words + at, mask=ok, other=0) >> (c % 32)[:, None]) & 1
    to = signs + ((tap * channels + c)[:, None] * outputs + k[None, :])
    if signs.dtype.element_ty == tl.float8e4nv:
        byte = (0xB8 - 0x80 * bit).to(tl.uint8)  # of -1 and 1
        tl.store(to, byte.to(tl.float8e4nv, bitcast=True), mask=ok)
    else:
        y = 2.0 * bit.to(tl.float32) - 1.0
        if scale is not None:
            y = y * vector(scale, k, k < outputs)[None, :]
        tl.store(to, y.to(signs.dtype.element_ty), mask=ok)


@triton.jit
def conv2d_sign_backward_kernel(grad, signs, x, shift, add, out, partial, clip, beta, rows, height,
                                width, oh, ow, top, left, dh, dw, outputs, channels,
                                TAPS: tl.constexpr, KW: tl.constexpr, PARTS: tl.constexpr,
                                WHOLE: tl.constexpr, ESTIMATOR: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                BLOCK_K: tl.constexpr):
    """PARTS: of a tap, of BLOCK_K output channels; WHOLE: all are. x None: the product alone."""
    EIGHT: tl.constexpr = 64 // grad.dtype.element_ty.primitive_bitwidth
    blocks = tl.cdiv(channels, BLOCK_N)
    tile = tl.program_id(0) // blocks
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = m < rows, c < channels
    column = m % width + left
    row = (m // width) % height + top
    image = m // (width * height) * oh
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(TAPS * PARTS):
        tap = step // PARTS
        k = (step % PARTS) * BLOCK_K + tl.arange(0, BLOCK_K)
        i = row - (tap // KW) * dh
        j = column - (tap % KW) * dw
        ok = (row_ok & (i >= 0) & (i < oh) & (j >= 0) & (j < ow))[:, None]
        there = col_ok[None, :]
        if not WHOLE:
            ok = ok & (k < outputs)[None, :]
            there = there & (k < outputs)[:, None]
        at = (((image + i) * ow + j) * outputs)[:, None] + k[None, :]
        if OLD:
            at = tl.multiple_of(tl.max_contiguous(at, (1, EIGHT)), (1, EIGHT))
        a = tl.load(grad + at, mask=ok, other=0.0, cache_modifier=".ca")
        at = ((tap * channels + c) * outputs)[None, :] + k[:, None]
        b = tl.load(signs + at, mask=there, other=0.0, cache_modifier=".ca")
        total = tl.dot(a, b, total, max_num_imprecise_acc=BLOCK_K)
    c = c[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    at = m[:, None] * channels + c
    if x is not None:
        if ESTIMATOR != IDENTITY:
            v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
            if shift is not None:
                v = v + vector(shift, c, col_ok[None, :])
            total = estimator_grad(total, v, clip, beta, ESTIMATOR)
        some = tl.sum(tl.where(ok, total, 0.0), axis=0).to(tl.float64)[None, :]
        tl.store(partial + tile * channels + c, some, mask=col_ok[None, :])
        if add is not None:
            total = total + tl.load(add + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=ok)


def packed_conv2d_sign_backward(grad, weight_words, channels, scale, input_size, input, shift, add,
                                pad, dilation, dtype, estimator, clip, beta):
    out, of_shift = fake(grad, weight_words, channels, scale, input_size, input, shift, add, pad,
                         dilation, dtype)
    if not out.numel():
        return out, of_shift.zero_()
    images, outputs, oh, ow = grad.shape
    rows, taps = images * input_size[0] * input_size[1], weight_words.shape[1:3].numel()
    signs = grad.new_empty((taps, channels, outputs), dtype=(
        torch.float8_e4m3fn if grad.element_size() == 1 else dtype))
    launch(unpack_filters_kernel, (taps * -(-outputs // 64), -(-channels // 64)),
           (weight_words.contiguous(), None if scale is None else scale.contiguous(), signs,
            outputs, channels, weight_words.shape[3], taps), (4,), BLOCK_W=2, BLOCK_K=64)
    block_n = min(max(32, 1 << (channels - 1).bit_length()), COLUMNS)
    block_k = min(max(32, 1 << (outputs - 1).bit_length()), BYTES // grad.element_size())
    tiles = -(-rows // ROWS)
    if clip is None and estimator == "ste_sign":
        estimator = "identity"
    partial = None
    if input is not None:
        partial = grad.new_empty((tiles, channels), dtype=torch.float64)
    launch(conv2d_sign_backward_kernel, (tiles * -(-channels // block_n), 1),
           (rows_of(grad), signs, None if input is None else rows_of(input),
            None if shift is None else shift.contiguous(), None if add is None else rows_of(add),
            out, partial, 0.0 if clip is None else float(clip), float(beta), rows, *input_size, oh,
            ow, pad[0], pad[2], *dilation, outputs, channels),
           (WARPS, STAGES,
            REGISTERS if block_n <= 64 and configs.family(grad.device) == "sm90" else None),
           TAPS=taps, KW=weight_words.shape[2], PARTS=-(-outputs // block_k),
           WHOLE=outputs % block_k == 0, ESTIMATOR=ESTIMATORS[estimator], BLOCK_M=ROWS,
           BLOCK_N=block_n, BLOCK_K=block_k)
    return out, of_shift if partial is None else sums.reduce(partial)
