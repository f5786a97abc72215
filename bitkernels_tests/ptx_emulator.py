"""Inline PTX of the Triton kernels in numpy, for the interpreter, which has none.

Only the instructions that the kernels use. Elements are dealt to registers of threads by a random
bijection: what a kernel computes must not depend on Triton's layout.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

READABLE = ("ld.global.nc.", "st.global.")


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    asm, dtype = getattr(asm, "value", asm), getattr(dtype, "value", dtype)
    pack = getattr(pack, "value", pack)
    dtypes = tuple(dtype) if isinstance(dtype, tuple) else (dtype,)
    count = args[0].handle.data.size
    shape = args[0].handle.data.shape
    threads = count // pack
    deal = np.random.default_rng(threads).permutation(count).reshape(pack, threads)
    registers: dict[str, np.ndarray] = {}
    if args[0].handle.data.itemsize == 2:
        return _pairs(asm, args, dtypes, deal)
    for i, arg in enumerate(args):
        assert arg.handle.data.shape == shape
        values = arg.handle.data.reshape(-1)
        if values.dtype == np.float32:
            values = values.view(np.int32)
        for slot in range(pack):
            registers[f"${(len(dtypes) + i) * pack + slot}"] = values[deal[slot]]
    _run(asm, registers, threads)
    outputs = []
    for i, one in enumerate(dtypes):
        data = np.empty(count, np.float32 if one == tl.float32 else np.int32)
        for slot in range(pack):
            value = registers[f"${i * pack + slot}"]
            data[deal[slot]] = value.astype(np.int32).view(data.dtype)
        outputs.append(tl.tensor(TensorHandle(data.reshape(shape), one),
                                 tl.block_type(one, list(shape))))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _pairs(asm: str, args, dtypes, deal: np.ndarray) -> tuple:
    """Of elements of 16 bits, two in a register."""
    registers = {}
    for i, arg in enumerate(args):
        low, high = arg.handle.data.reshape(-1).view(np.uint16)[deal].astype(np.uint32)
        registers[f"${len(dtypes) + i}"] = low | high << 16
    _run(asm, registers, deal.shape[1])
    outputs, like = [], args[0].handle.data
    for i, one in enumerate(dtypes):
        data = np.empty(like.size, np.uint16)
        for slot in (0, 1):
            data[deal[slot]] = registers[f"${i}"] >> 16 * slot & 0xFFFF
        data = data.view(np.int16 if one == tl.int16 else like.dtype).reshape(like.shape)
        outputs.append(tl.tensor(TensorHandle(data, one), tl.block_type(one, list(like.shape))))
    return tuple(outputs)


def _run(asm: str, registers: dict[str, np.ndarray], threads: int) -> None:
    lanes = np.arange(threads)

    def read(name: str) -> np.ndarray:
        if name == "%tid.x":
            return lanes
        if name == "%laneid":
            return lanes % 32
        if name == "%ctaid.z":
            return np.zeros(threads, int)
        if name in registers:
            return registers[name]
        return np.full(threads, int(name, 0))

    for statement in re.split(r";\s*", asm):
        statement = statement.strip(" \n").removeprefix("{").strip()
        if statement in ("", "}") or statement.startswith(".reg"):
            continue
        where = np.ones(threads, bool)
        if statement.startswith("@"):
            condition, _, statement = statement.partition(" ")
            where = registers[condition[1:]]
        op, _, rest = statement.partition(" ")
        if op == "bar.warp.sync":
            continue
        if op.startswith("mma.sync"):
            assert op == "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
            d, a, b, c = (group.split(", ") for group in re.findall(r"\{(.*?)\}", rest))
            results = _mma(*([read(r) for r in group] for group in (a, b, c)))
            registers.update(zip(d, results, strict=True))
            continue
        if op.startswith(READABLE):
            _memory(op, rest, where, read, registers)
            continue
        names = [name.strip() for name in rest.split(",")]
        assert where.all(), "only loads and stores have conditions"
        values = [read(name) for name in names[1:]]
        registers[names[0]] = _value(op, values, lanes)


def _value(op: str, v: list[np.ndarray], lanes: np.ndarray) -> np.ndarray:
    match op:
        case "mov.u32" | "mov.b32":
            return v[0]
        case "shr.u32":
            return v[0] >> v[1]
        case "or.b32":
            return v[0] | v[1]
        case "and.b32":
            return v[0] & v[1]
        case "xor.b32":
            return v[0] ^ v[1]
        case "add.u32":
            return v[0] + v[1]
        case "lop3.b32":
            return sum((np.bitwise_and.reduce([x if i >> 2 - j & 1 else ~x
                                               for j, x in enumerate(v[:3])])
                        for i in range(8) if v[3][0] >> i & 1), np.zeros_like(v[0]))
        case "set.gt.u32.f16x2" | "set.gt.u32.bf16x2":
            return _halves(op, v, np.greater)
        case "set.nan.u32.f16x2" | "set.nan.u32.bf16x2":
            return _halves(op, v, lambda x, y: np.isnan(x) | np.isnan(y))
        case "setp.ne.b32":
            return v[0] != v[1]
        case "selp.b32":
            return np.where(v[2], v[0], v[1])
        case "shfl.sync.bfly.b32":
            return v[0][lanes ^ v[1]]
        case "prmt.b32":
            pool = np.stack([(x.astype(np.int64) >> 8 * i) & 255 for x in v[:2] for i in range(4)])
            picks = [(v[2] >> 4 * i) & 15 for i in range(4)]
            return sum(pool[p, lanes] << 8 * i for i, p in enumerate(picks)
                       ).astype(np.uint32).view(np.int32)
        case "cvt.rn.f16x2.f32" | "cvt.rn.bf16x2.f32":
            high, low = (_short(x.view(np.float32), op) for x in v)
            return (low | high << 16).view(np.int32)
    raise NotImplementedError(op)


def _halves(op: str, v: list[np.ndarray], compare) -> np.ndarray:
    """A mask of each half's comparison."""
    found = np.zeros_like(v[0])
    for shift in (0, 16):
        bits = [(x >> shift & 0xFFFF).astype(np.uint32) for x in v]
        x, y = ((b << 16).view(np.float32) if "bf16" in op else
                b.astype(np.uint16).view(np.float16) for b in bits)
        found |= np.where(compare(x, y), 0xFFFF << shift, 0).astype(np.uint32)
    return found


def _short(x: np.ndarray, op: str) -> np.ndarray:
    """float32 as bits of a 16-bit type; bfloat16 cut off, as the interpreter does."""
    if "bf16" in op:
        return x.view(np.uint32) >> 16
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _memory(op: str, rest: str, where, read, registers) -> None:
    """A vector of 32-bit words, at an address that its size divides."""
    words = int(re.search(r"\.v(\d)\.", op)[1]) if ".v" in op else 1
    base, offset = re.search(r"\[(\$\d+)(?: \+ (\d+))?\]", rest).groups()
    names = re.findall(r"[$\w]+", rest.replace(rest[rest.index("["):rest.index("]") + 1], ""))
    assert len(names) == words
    at = read(base) + int(offset or 0)
    assert not np.any(at[where] % (4 * words)), f"not aligned: {op} {rest} {at[where][:8]}"
    for i, name in enumerate(names):
        if op.startswith("ld."):
            value = registers[name].copy() if not where.all() else np.zeros(len(at), np.int32)
            for thread in np.flatnonzero(where):
                value[thread] = ctypes.c_int32.from_address(int(at[thread]) + 4 * i).value
            registers[name] = value
        else:
            value = read(name)
            for thread in np.flatnonzero(where):
                cell = ctypes.c_int32.from_address(int(at[thread]) + 4 * i)
                cell.value = int(value[thread])


def _mma(a, b, c):
    """m16n8k256 on the fragments of every warp; lane = 4 g + t.

    A register 2 i + j holds row g + 8 j, word t + 4 i; B register i column g, word t + 4 i;
    C register 2 j + k row g + 8 j, column 2 t + k.
    """
    a, b = (np.stack([r.astype(np.int32).view(np.uint32).reshape(-1, 8, 4) for r in f])
            for f in (a, b))
    left = np.concatenate([np.concatenate([a[0], a[2]], 2), np.concatenate([a[1], a[3]], 2)], 1)
    right = np.concatenate([b[0], b[1]], 2)
    d = np.bitwise_count(left[:, :, None] & right[:, None]).astype(np.int64).sum(-1)
    return [c[2 * j + k] + d[:, 8 * j : 8 * j + 8, k::2].reshape(-1)
            for j in (0, 1) for k in (0, 1)]
