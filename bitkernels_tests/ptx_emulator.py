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

PER_THREAD = 8


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    asm, dtype = getattr(asm, "value", asm), getattr(dtype, "value", dtype)
    assert pack == PER_THREAD, "only the blocks of eight registers are emulated"
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    count = args[0].handle.data.size
    threads = count // PER_THREAD
    deal = np.random.default_rng(threads).permutation(count).reshape(PER_THREAD, threads)
    registers: dict[str, np.ndarray] = {}
    for i, arg in enumerate(args):
        assert arg.handle.data.shape == (count,)
        for slot in range(PER_THREAD):
            number = (len(dtypes) + i) * PER_THREAD + slot
            registers[f"${number}"] = arg.handle.data[deal[slot]]
    _run(asm, registers, threads)
    outputs = []
    for i, one in enumerate(dtypes):
        data = np.empty(count, np.float32 if one == tl.float32 else np.int32)
        for slot in range(PER_THREAD):
            value = registers[f"${i * PER_THREAD + slot}"]
            data[deal[slot]] = value.astype(np.int32).view(data.dtype)
        outputs.append(tl.tensor(TensorHandle(data, one), tl.block_type(one, [count])))
    return tuple(outputs) if isinstance(dtype, tuple) else outputs[0]


def _run(asm: str, registers: dict[str, np.ndarray], threads: int) -> None:
    def read(name: str) -> np.ndarray:
        if name == "%tid.x":
            return np.arange(threads)
        if name == "%laneid":
            return np.arange(threads) % 32
        if name.lstrip("-").isdigit():
            return np.full(threads, int(name))
        return registers[name]

    for statement in re.split(r";\s*", asm):
        statement = statement.strip(" \n").removeprefix("{ ")
        if statement in ("", "}") or statement.startswith(".reg"):
            continue
        op, _, rest = statement.partition(" ")
        if op == "bar.warp.sync":
            continue
        if op.startswith("mma.sync"):
            assert op == "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
            d, a, b, c = (group.split(", ") for group in re.findall(r"\{(.*?)\}", rest))
            results = _mma(*([read(r) for r in group] for group in (a, b, c)))
            registers.update(zip(d, results, strict=True))
            continue
        names = [name.strip() for name in rest.split(",")]
        if op in ("mov.u32", "mov.b32"):
            registers[names[0]] = read(names[1])
        elif op == "shr.u32":
            registers[names[0]] = read(names[1]) >> read(names[2])
        elif op == "or.b32":
            registers[names[0]] = read(names[1]) | read(names[2])
        elif op == "shfl.sync.bfly.b32":
            registers[names[0]] = read(names[1])[np.arange(threads) ^ int(names[2])]
        elif op == "ld.global.b32":
            first = int(names[1].strip("[]$"))
            at = read(f"${first}")
            for slot in range(1, PER_THREAD):
                assert np.array_equal(at, read(f"${first + slot}")), "not one column a thread"
            registers[names[0]] = np.array(
                [ctypes.c_int32.from_address(int(a)).value for a in at], np.int32)
        else:
            raise NotImplementedError(statement)


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
