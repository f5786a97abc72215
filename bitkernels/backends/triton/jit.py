"""Device functions shared by the kernels: popcount, bit planes, packing, the epilogue.

Everything is written so that the interpreter and AMD run plain integer code; inline PTX is behind
constexpr switches (PTX).
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra import cuda
    from triton.language.target_info import cuda_capability_geq
except ImportError:  # triton 3.4, and one for AMD alone
    cuda = cuda_capability_geq = None

# Whether kernels may start while the one before them ends, on GPUs from sm_90 on.
OVERLAPS = tl.constexpr(cuda_capability_geq is not None)
_PLANE_ASM = tl.constexpr(tuple(
    f"{{ .reg .b32 t; shr.b32 t, $1, {bit}; and.b32 $0, t, 0x01010101; }}" for bit in range(8)))


@triton.jit
def begin():
    """The first line of a kernel that is launched with `launch_pdl`: from sm_90 on it may have
    been started while the kernel before it was ending. Here it waits for what that one has written,
    and lets the next one start as soon as all its own blocks have."""
    if OVERLAPS:
        if cuda_capability_geq(9, 0):
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()


@triton.jit
def block_index(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Indices of this program's block along axis 0: int64 if WIDE, where offsets reach 2^31.

    Not always int64, since its divisions are calls of a hundred instructions.
    """
    if WIDE:
        return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def tile_rows(tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Indices of a walk's tile, as `block_index`. Made anew from a number in every turn: carried
    along they would change their layout in each, through shared memory and its barriers."""
    if WIDE:
        return tl.arange(0, BLOCK).to(tl.int64) + tile * tl.full([BLOCK], BLOCK, tl.int64)
    else:
        return tl.arange(0, BLOCK) + tile * BLOCK


@triton.jit
def row_offset(r, inner, outer_stride, inner_stride):
    """Where rows begin; inner None: one run of rows, which saves the divisions."""
    if inner is None:
        return r * inner_stride
    else:
        return (r // inner) * outer_stride + (r % inner) * inner_stride


@triton.jit
def shift_tile(shift, r, c, ok, col_ok, channels, each):
    """Shifts of rows by channels, float32: (channels,), or one such vector for `each` rows."""
    if each is None:
        return tl.load(shift + c, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    else:
        at = ((r // each) * channels)[:, None] + c[None, :]
        return tl.load(shift + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def popcount(x, PTX: tl.constexpr):
    """Number of set bits of every int32."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32,
                                         is_pure=True, pack=1)
    else:
        u = x.to(tl.uint32, bitcast=True)
        u = u - ((u >> 1) & 0x55555555)
        u = (u & 0x33333333) + ((u >> 2) & 0x33333333)
        u = (u + (u >> 4)) & 0x0F0F0F0F
        u = u + (u >> 8)
        u = u + (u >> 16)
        return (u & 0x3F).to(tl.int32)


@triton.jit
def bit_plane(x, BIT: tl.constexpr, PTX: tl.constexpr):
    """Bit BIT of every byte of an int8 tensor, as int8 0 or 1: two instructions for four bytes."""
    if PTX:
        return tl.inline_asm_elementwise(_PLANE_ASM[BIT], "=r,r", [x], dtype=tl.int8, is_pure=True,
                                         pack=4)
    else:
        return (x >> BIT) & 1


@triton.jit
def pack_signs(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Booleans (ROWS, COLS) to int32 words (ROWS, COLS / 32)."""
    wide = tl.reshape(bits.to(tl.int32), (ROWS, COLS // 32, 32))
    return tl.sum(wide << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def vector(ptr, cols, mask):
    """Values of a channel vector as float32, 0 outside."""
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def as_float8(y):
    """float16 or bfloat16 to float8_e5m2, to the nearest even, beyond its range infinite, as in
    PyTorch: GPUs' own conversion ends at the largest number. Of a bfloat16 nothing that counts is
    lost in float16, of which it is the upper byte."""
    bits = y.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    size = bits & 0x7FFF
    byte = tl.where(size > 0x7C00, 0x7F, (size + 0x7F + ((size >> 8) & 1)) >> 8)
    return (byte | ((bits >> 8) & 0x80)).to(tl.uint8).to(tl.float8e5, bitcast=True)


@triton.jit
def activate(y, clamp_min, clamp_max, scale, bias, residual, shift_in, slope, shift_out):
    """reference.epilogue on float32 values; absent parts are None.

    Compiled without fused multiply-add: one rounding a step.
    """
    if clamp_min is not None:
        y = tl.maximum(y, clamp_min)
    if clamp_max is not None:
        y = tl.minimum(y, clamp_max)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    if slope is not None:
        if shift_in is not None:
            y = y + shift_in
        y = tl.where(y > 0, y, y * slope)
        if shift_out is not None:
            y = y + shift_out
    return y


@triton.jit
def epilogue(dot, cols, col_mask, residual, clamp_min, clamp_max, scale, bias, shift_in, slope,
             shift_out):
    """The same on a tile of dot products, which `cols` broadcasts against."""
    return activate(
        dot.to(tl.float32), clamp_min, clamp_max,
        vector(scale, cols, col_mask) if scale is not None else None,
        vector(bias, cols, col_mask) if bias is not None else None,
        residual.to(tl.float32) if residual is not None else None,
        vector(shift_in, cols, col_mask) if slope is not None and shift_in is not None else None,
        vector(slope, cols, col_mask) if slope is not None else None,
        vector(shift_out, cols, col_mask) if slope is not None and shift_out is not None else None)


@triton.jit
def sign_bits(y, dot, cols, col_mask, sign_shift, threshold, N):
    """Output bits of a tile: not (y + sign_shift < 0), or low <= dot <= high with thresholds."""
    if threshold is not None:
        low = tl.load(threshold + cols, mask=col_mask, other=0)
        high = tl.load(threshold + N + cols, mask=col_mask, other=0)
        return (dot >= low) & (dot <= high) & col_mask
    else:
        if sign_shift is not None:
            y = y + vector(sign_shift, cols, col_mask)
        return ~(y < 0) & col_mask
