"""How b1.py reads and writes: vectors of words by inline PTX, and what 32 bits of them hold."""

from __future__ import annotations

import triton
import triton.language as tl

from bitkernels.backends.triton.b1_ptx import (
    FENCE,
    FENCE_IO,
    FLOAT32,
    HALVES,
    INT32,
    LOAD,
    LOAD_IO,
    LOAD_ONCE,
    LOAD_ONCE_IO,
    LOAD_WHERE,
    LOAD_WHERE_IO,
    STORE_WHERE,
    STORE_WHERE_IO,
)


@triton.jit
def fence(x, SLOTS: tl.constexpr):
    """A copy; loads below it are not drawn up past it, where registers are short."""
    return tl.inline_asm_elementwise(FENCE[SLOTS // 8], FENCE_IO[SLOTS // 8], [x], dtype=tl.int32,
                                     is_pure=False, pack=SLOTS)


@triton.jit
def load(at, SLOTS: tl.constexpr, WORDS: tl.constexpr):
    """A tuple of the WORDS words at each address."""
    KIND: tl.constexpr = (SLOTS // 8) * 3 + WORDS // 2
    found = tl.inline_asm_elementwise(LOAD[KIND], LOAD_IO[KIND], [at.to(tl.int64)],
                                      dtype=INT32[WORDS], is_pure=False, pack=SLOTS)
    if WORDS == 1:
        return (found,)
    else:
        return found


@triton.jit
def load_where(at, condition, SLOTS: tl.constexpr, WORDS: tl.constexpr):
    KIND: tl.constexpr = (SLOTS // 8) * 3 + WORDS // 2
    found = tl.inline_asm_elementwise(
        LOAD_WHERE[KIND], LOAD_WHERE_IO[KIND], [at.to(tl.int64), condition],
        dtype=INT32[WORDS], is_pure=False, pack=SLOTS)
    if WORDS == 1:
        return (found,)
    else:
        return found


@triton.jit
def load_once(at, SLOTS: tl.constexpr, WORDS: tl.constexpr):
    """The same of one address a thread, which the first slot has."""
    KIND: tl.constexpr = (SLOTS // 8) * 3 + WORDS // 2
    if at.dtype.element_ty.is_floating():
        found = tl.inline_asm_elementwise(
            LOAD_ONCE[KIND], LOAD_ONCE_IO[KIND], [at.to(tl.int64)], dtype=FLOAT32[WORDS],
            is_pure=False, pack=SLOTS)
    else:
        found = tl.inline_asm_elementwise(
            LOAD_ONCE[KIND], LOAD_ONCE_IO[KIND], [at.to(tl.int64)], dtype=INT32[WORDS],
            is_pure=False, pack=SLOTS)
    if WORDS == 1:
        return (found,)
    else:
        return found


@triton.jit
def channels(vector, n, N, SLOTS: tl.constexpr, EIGHTS: tl.constexpr):
    """Values of channels n to n + 3 of a 32-bit vector; those past the end are anything."""
    if EIGHTS:
        return load_once(vector + n, SLOTS, 4)
    else:
        return (load_once(vector + tl.minimum(n, N - 1), SLOTS, 1)
                + load_once(vector + tl.minimum(n + 1, N - 1), SLOTS, 1)
                + load_once(vector + tl.minimum(n + 2, N - 1), SLOTS, 1)
                + load_once(vector + tl.minimum(n + 3, N - 1), SLOTS, 1))


@triton.jit
def corrections(corr, row, n, N, SLOTS: tl.constexpr, EIGHTS: tl.constexpr):
    """The same of rows that each have a vector of their own, `row` elements on."""
    if EIGHTS:
        return load(corr + (row + n), SLOTS, 4)
    else:
        return (load(corr + (row + tl.minimum(n, N - 1)), SLOTS, 1)
                + load(corr + (row + tl.minimum(n + 1, N - 1)), SLOTS, 1)
                + load(corr + (row + tl.minimum(n + 2, N - 1)), SLOTS, 1)
                + load(corr + (row + tl.minimum(n + 3, N - 1)), SLOTS, 1))


@triton.jit
def store(at, values, condition, SLOTS: tl.constexpr):
    """16 bytes a slot; values: 4 tensors of 32 bits."""
    tl.inline_asm_elementwise(
        STORE_WHERE[SLOTS // 8], STORE_WHERE_IO[SLOTS // 8],
        values + (at.to(tl.int64), condition), dtype=tl.int32, is_pure=False, pack=SLOTS)


@triton.jit
def pair(low, high, TYPE: tl.constexpr):
    """Two values as 16-bit ones in a word."""
    if TYPE.is_int():
        return (low & 0xFFFF) | (high << 16)
    else:
        return tl.inline_asm_elementwise(HALVES[1 if TYPE.is_bf16() else 0], "=r,r,r", [low, high],
                                         dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def half_of(word, HIGH: tl.constexpr, TYPE: tl.constexpr):
    """The lower or upper 16 bits of a word, which are a TYPE, as float32."""
    part = word.to(tl.uint32, bitcast=True)
    if TYPE.is_bf16():
        bits = part & 0xFFFF0000 if HIGH else part << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        part = part >> 16 if HIGH else part & 0xFFFF
        return part.to(tl.uint16).to(TYPE, bitcast=True).to(tl.float32)
