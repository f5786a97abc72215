"""The kernels that csrc/cuda has, and which of them have run where.

A kernel is a class template of csrc/cuda with its tile; everything else about a call is in its
`Spec`. The names say family and tile: `mma_128x64` computes 128 pixels by 64 channels a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

WINDOW = 16  # bytes of a Window (layout.cuh)


@dataclass(frozen=True)
class Kernel:
    name: str
    header: str
    type: str  # the C++ class, with THREADS, BLOCKS and run(Params)
    bm: int
    bn: int
    threads: int
    shared: int  # bytes of dynamic shared memory
    blocks: int  # that must fit on a multiprocessor: the register budget
    windows: bool = False  # whether it wants the windows counted by `prepare`
    bulk: bool = False  # whether it takes tensor maps of both operands
    persistent: bool = False  # whether a block computes many tiles

    @property
    def family(self) -> str:
        return self.name.split("_")[0]

    @property
    def source(self) -> str:
        arguments, call = "const __grid_constant__ Params p", "p"
        if self.windows:
            arguments += "".join(f", const __grid_constant__ TensorMap {n}" for n in "ab")
            call += ", a, b"
        return (f'#include "{self.header}"\n'
                f"extern \"C\" __global__ void __launch_bounds__({self.threads}, {self.blocks})\n"
                f"bitkernels_kernel({arguments}) {{\n"
                f"  {self.type}::run({call});\n"
                "}\n")


def _mma(bm: int, bn: int, wm: int, wn: int, stages: int, blocks: int) -> Kernel:
    warps_n = bn // wn
    shared = stages * (bm + bn) * 64 + bm * WINDOW + warps_n * bm * 4
    return Kernel(f"mma_{bm}x{bn}", "mma_gemm.cuh", f"MmaGemm<{bm}, {bn}, {wm}, {wn}, {stages}>",
                  bm, bn, 32 * (bm // wm) * warps_n, shared, blocks)


def _wgmma(strips: int, bn: int, stages: int, bulk: bool) -> Kernel:
    bm = 2 * strips * 64
    shared = stages * (bm + bn) * 128 + bm * WINDOW + 16 * stages
    name = f"{'bulk' if bulk else 'wgmma'}_{bm}x{bn}"
    cpp = f"WgmmaGemm<2, {strips}, {bn}, {stages}, {str(bulk).lower()}>"
    return Kernel(name, "wgmma_gemm.cuh", cpp, bm, bn, 384, shared, 1, windows=True, bulk=bulk,
                  persistent=True)


MMA = (
    _mma(128, 128, 64, 64, 3, 2),
    _mma(128, 64, 32, 64, 4, 2),
    _mma(64, 64, 32, 32, 4, 3),
    _mma(64, 32, 16, 32, 4, 4),
)
WGMMA = (_wgmma(1, 256, 4, False), _wgmma(2, 128, 4, False), _wgmma(1, 128, 4, False),
         _wgmma(1, 64, 6, False))
BULK = (_wgmma(1, 256, 4, True), _wgmma(2, 128, 4, True), _wgmma(1, 128, 6, True))
PREPARE = Kernel("prepare", "prepare.cuh", "Prepare<4>", 4, 0, 128, 0, 4)
PEAK_MMA = Kernel("peak_mma", "peak.cuh", "Peak<false>", 0, 0, 256, 0, 1)
PEAK_WGMMA = Kernel("peak_wgmma", "peak.cuh", "Peak<true>", 0, 0, 256, 49152, 1)
ALL = {kernel.name: kernel for kernel in (*MMA, *WGMMA, *BULK, PREPARE)}

# (family, architecture): the day on which it passed its tests on that GPU and was measured. What is
# not here runs only where BITKERNELS_CUDA=1 asks for it.
PROVEN: dict[tuple[str, str], str] = {}

FAMILIES = {"sm_80": ("mma",), "sm_86": ("mma",), "sm_87": ("mma",), "sm_89": ("mma",),
            "sm_90a": ("bulk", "wgmma", "mma")}


def architecture(capability: tuple[int, int]) -> str | None:
    """What to compile for, or None where the 1-bit tensor core is missing or only emulated."""
    name = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    return name if name in FAMILIES else None


# Products a clock and multiprocessor that a kernel is expected to reach at best, relative to the
# others: the first for its shape. Derived from how often a tile reads its operands from L2 and
# shared memory (docs/performance.md); no GPU has measured them yet.
RATES = {"bulk_128x256": 10, "bulk_256x128": 9.5, "bulk_128x128": 8, "wgmma_128x256": 9,
         "wgmma_256x128": 8.5, "wgmma_128x128": 7, "wgmma_128x64": 5, "mma_128x128": 5,
         "mma_128x64": 4, "mma_64x64": 3, "mma_64x32": 2}


@functools.lru_cache(maxsize=4096)
def fitting(families: tuple[str, ...], rows: int, cout: int, multiprocessors: int,
            aligned: bool) -> tuple[Kernel, ...]:
    """Kernels for so many rows and channels, the one expected to be fastest first.

    `aligned`: the call is a product of two matrices whose rows are multiples of 16 bytes, as bulk
    tensor copies want them.
    """
    def clocks(kernel: Kernel) -> float:
        tiles = -(-rows // kernel.bm) * -(-cout // kernel.bn)
        side_by_side = min(kernel.blocks, -(-tiles // multiprocessors))
        rounds = -(-tiles // (multiprocessors * side_by_side))
        return rounds * side_by_side * kernel.bm * kernel.bn / RATES[kernel.name]

    found = [k for k in (*BULK, *WGMMA, *MMA) if k.family in families and (aligned or not k.bulk)]
    return tuple(sorted(found, key=clocks))
