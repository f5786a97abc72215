"""Inline PTX of b1.py: blocks on the registers of one thread, of SLOTS = 4 or 8 rows each.

A block is a text and its constraints; every tensor in or out is SLOTS registers (or as many
addresses), outputs first. Blocks of one address take it from the first slot: all are equal there.
Loads are `.nc`: nothing that a kernel reads is written meanwhile, so they may be moved freely.
"""

from __future__ import annotations

import triton.language as tl

COLUMN_TILES = 8  # of 8 columns; a warp owns 64


def _constraints(outputs: int, *inputs: tuple[int, str]) -> str:
    return ",".join(["=&r"] * outputs + [kind for count, kind in inputs for _ in range(count)])


def _braced(*lines: str) -> str:
    return "\n".join(["{", *lines, "}"])


def _mma(slots: int) -> tuple[str, str]:
    """16 accumulators by column and one pair that counts the rows' bits, all one product on.

    In: a_lo, a_hi, 8 b_lo, 8 b_hi, 18 accumulators. Of a b the first slot counts.
    """
    outputs = 18 * slots
    a_lo, a_hi = outputs, outputs + slots
    b_lo = a_hi + slots
    b_hi = b_lo + COLUMN_TILES * slots
    c = b_hi + COLUMN_TILES * slots
    lines = [".reg .b32 ones, zero, a0, a1, a2, a3;", "mov.b32 ones, -1;",
             "mov.u32 zero, %ctaid.z;"]
    for m in range(slots // 2):
        given = [f"${base + 2 * m + half}" for base in (a_lo, a_hi) for half in (0, 1)]
        lines += [f"or.b32 a{i}, {name}, zero;" for i, name in enumerate(given)]
        a = "a0, a1, a2, a3"
        for n in range(COLUMN_TILES + 1):
            # Accumulator 2 half + b of tile (m, n) is element 2 m + half of tensor 2 n + b.
            tile = [(2 * n + b) * slots + 2 * m + half for half in (0, 1) for b in (0, 1)]
            d = ", ".join(f"${i}" for i in tile)
            e = ", ".join(f"${c + i}" for i in tile)
            b = (f"${b_lo + n * slots}, ${b_hi + n * slots}" if n < COLUMN_TILES
                 else "ones, ones")
            lines.append("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                         f"{{{d}}}, {{{a}}}, {{{b}}}, {{{e}}};")
    inputs = slots * (2 + 2 * COLUMN_TILES + 18)
    return _braced(*lines), _constraints(outputs, (inputs, "r"))


def _where(slots: int) -> tuple[str, str]:
    """Lane, warp and slot. In: any tensor."""
    lines = [".reg .u32 lane, warp;", "mov.u32 lane, %laneid;", "mov.u32 warp, %tid.x;",
             "shr.u32 warp, warp, 5;"]
    for slot in range(slots):
        lines += [f"mov.u32 ${slot}, lane;", f"mov.u32 ${slots + slot}, warp;",
                  f"mov.u32 ${2 * slots + slot}, {slot};"]
    return _braced(*lines), _constraints(3 * slots, (slots, "r"))


def _fence(slots: int) -> tuple[str, str]:
    """A copy that no load passes."""
    lines = ["bar.warp.sync -1;", *(f"mov.b32 ${i}, ${slots + i};" for i in range(slots))]
    return _braced(*lines), _constraints(slots, (slots, "r"))


def _registers(tensors: int, slots: int, slot: int, base: int = 0) -> str:
    return ", ".join(f"${base + i * slots + slot}" for i in range(tensors))


def _vector(words: int) -> str:
    return "b32" if words == 1 else f"v{words}.b32"


def _braces(names: str) -> str:
    return f"{{{names}}}" if "," in names else names


def _load(words: int, slots: int) -> tuple[str, str]:
    """Each slot's `words` neighbouring words. In: addresses."""
    outputs = words * slots
    lines = [f"ld.global.nc.{_vector(words)} {_braces(_registers(words, slots, slot))}, "
             f"[${outputs + slot}];" for slot in range(slots)]
    return _braced(*lines), _constraints(outputs, (slots, "l"))


def _load_where(words: int, slots: int) -> tuple[str, str]:
    """The same, or zeros without reading. In: addresses, conditions."""
    outputs = words * slots
    lines = [".reg .pred p;"]
    for slot in range(slots):
        lines += [f"mov.b32 ${i * slots + slot}, 0;" for i in range(words)]
        lines += [f"setp.ne.b32 p, ${outputs + slots + slot}, 0;",
                  f"@p ld.global.nc.{_vector(words)} "
                  f"{_braces(_registers(words, slots, slot))}, [${outputs + slot}];"]
    return _braced(*lines), _constraints(outputs, (slots, "l"), (slots, "r"))


def _load_once(words: int, slots: int) -> tuple[str, str]:
    """`words` neighbouring words for all slots. In: an address."""
    outputs = words * slots
    lines = [f"ld.global.nc.{_vector(words)} {_braces(_registers(words, slots, 0))}, "
             f"[${outputs}];"]
    lines += [f"mov.b32 ${i * slots + slot}, ${i * slots};"
              for i in range(words) for slot in range(1, slots)]
    return _braced(*lines), _constraints(outputs, (slots, "l"))


def _store_where(words: int, slots: int) -> tuple[str, str]:
    """Each slot's words, 4 at a time. Out: nothing of use. In: words, addresses, conditions."""
    address, condition = slots * (1 + words), slots * (2 + words)
    lines = [".reg .pred p;"]
    for slot in range(slots):
        lines += [f"mov.b32 ${slot}, 0;", f"setp.ne.b32 p, ${condition + slot}, 0;",
                  f"@p st.global.{_vector(words)} [${address + slot}], "
                  f"{_braces(_registers(words, slots, slot, slots))};"]
    return _braced(*lines), _constraints(slots, (words * slots, "r"), (slots, "l"), (slots, "r"))


def _store_signs(whole: bool, slots: int) -> tuple[str, str]:
    """Bits 0-7 and 8-15 of the 4 lanes of a quad, as two words a row.

    In: bits, addresses, conditions of the first and of the second word. Lane t stores row
    t of every four: a transposition of 16-bit parts, first with lane t ^ 2, then with t ^ 1. After
    it lane t ^ x has its part at bytes 0, 4, 2, 6 for x = 0, 1, 2, 3 of kept and got.
    """
    bits, address, first, second = slots, 2 * slots, 3 * slots, 4 * slots
    lines = [".reg .pred p, q, odd, high;", ".reg .b32 lane, a, b, kept, sent, got, pick, other;",
             "mov.u32 lane, %laneid;", "and.b32 pick, lane, 1;", "setp.ne.b32 odd, pick, 0;",
             "and.b32 pick, lane, 2;", "setp.ne.b32 high, pick, 0;"]
    for row in range(0, slots, 4):
        r = [f"${bits + row + i}" for i in range(4)]
        lines += [f"mov.b32 ${row + i}, 0;" for i in range(4)]
        lines += [f"prmt.b32 a, {r[0]}, {r[1]}, 0x5410;", f"prmt.b32 b, {r[2]}, {r[3]}, 0x5410;",
                  "selp.b32 kept, b, a, high;", "selp.b32 sent, a, b, high;",
                  "shfl.sync.bfly.b32 got, sent, 2, 31, -1;",
                  "selp.b32 pick, 0x7632, 0x5410, odd;", "selp.b32 other, 0x5410, 0x7632, odd;",
                  "prmt.b32 sent, kept, got, other;", "prmt.b32 kept, kept, got, pick;",
                  "shfl.sync.bfly.b32 got, sent, 1, 31, -1;",
                  "selp.b32 pick, 0x2604, 0x6240, odd;", "selp.b32 other, 0x2222, 0, high;",
                  "xor.b32 pick, pick, other;", "prmt.b32 a, kept, got, pick;",
                  "add.u32 pick, pick, 0x1111;", "prmt.b32 b, kept, got, pick;",
                  f"setp.ne.b32 p, ${first + row}, 0;"]
        if whole:
            lines += [f"@p st.global.v2.b32 [${address + row}], {{a, b}};"]
        else:
            lines += [f"setp.ne.b32 q, ${second + row}, 0;",
                      f"@p st.global.b32 [${address + row}], a;",
                      f"@q st.global.b32 [${address + row} + 4], b;"]
    return _braced(*lines), _constraints(slots, (slots, "r"), (slots, "l"), (2 * slots, "r"))


def _table(*blocks: tuple[str, str]) -> tuple[tl.constexpr, tl.constexpr]:
    """Texts, constraints."""
    texts, constraints = zip(*blocks, strict=True)
    return tl.constexpr(texts), tl.constexpr(constraints)


# By SLOTS // 8, and within by the width in words // 2: 1, 2 or 4.
MMA, MMA_IO = _table(*(_mma(s) for s in (4, 8)))
WHERE, WHERE_IO = _table(*(_where(s) for s in (4, 8)))
FENCE, FENCE_IO = _table(*(_fence(s) for s in (4, 8)))
LOAD, LOAD_IO = _table(*(_load(w, s) for s in (4, 8) for w in (1, 2, 4)))
LOAD_WHERE, LOAD_WHERE_IO = _table(*(_load_where(w, s) for s in (4, 8) for w in (1, 2, 4)))
LOAD_ONCE, LOAD_ONCE_IO = _table(*(_load_once(w, s) for s in (4, 8) for w in (1, 2, 4)))
STORE_WHERE, STORE_WHERE_IO = _table(*(_store_where(4, s) for s in (4, 8)))
STORE_SIGNS, STORE_SIGNS_IO = _table(*(_store_signs(whole, s) for s in (4, 8)
                                       for whole in (False, True)))
HALVES = tl.constexpr(("cvt.rn.f16x2.f32 $0, $2, $1;", "cvt.rn.bf16x2.f32 $0, $2, $1;"))
INT32 = tl.constexpr(tuple((tl.int32,) * count if count > 1 else tl.int32 for count in range(19)))
FLOAT32 = tl.constexpr(tuple((tl.float32,) * count if count > 1 else tl.float32
                             for count in range(5)))
