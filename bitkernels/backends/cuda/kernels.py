"""The kernels that csrc/cuda has, and which of them have run where.

A kernel is a class template of csrc/cuda with its tile; everything else about a call is in its
`Spec`. The names say family and tile: `mma_128x64` computes 128 pixels by 64 channels a block.
"""

from __future__ import annotations

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

    @property
    def family(self) -> str:
        return self.name.split("_")[0]

    def grid(self, tiles: int, device) -> int:
        return tiles

    @property
    def source(self) -> str:
        return (f'#include "{self.header}"\n'
                f"extern \"C\" __global__ void __launch_bounds__({self.threads}, {self.blocks})\n"
                "bitkernels_kernel(const __grid_constant__ Params p) {\n"
                f"  {self.type}::run(p);\n"
                "}\n")


def _mma(bm: int, bn: int, wm: int, wn: int, stages: int, blocks: int) -> Kernel:
    warps_n = bn // wn
    shared = stages * (bm + bn) * 64 + bm * WINDOW + warps_n * bm * 4
    return Kernel(f"mma_{bm}x{bn}", "mma_gemm.cuh", f"MmaGemm<{bm}, {bn}, {wm}, {wn}, {stages}>",
                  bm, bn, 32 * (bm // wm) * warps_n, shared, blocks)


MMA = (
    _mma(128, 128, 64, 64, 3, 2),
    _mma(128, 64, 32, 64, 4, 2),
    _mma(64, 64, 32, 32, 4, 3),
    _mma(64, 32, 16, 32, 4, 4),
)
PREPARE = Kernel("prepare", "prepare.cuh", "Prepare<4>", 4, 0, 128, 0, 4)
ALL = {kernel.name: kernel for kernel in (*MMA, PREPARE)}

# (family, architecture): the day on which it passed its tests on that GPU and was measured. What is
# not here runs only where BITKERNELS_CUDA=1 asks for it.
PROVEN: dict[tuple[str, str], str] = {}

FAMILIES = {"sm_80": ("mma",), "sm_86": ("mma",), "sm_87": ("mma",), "sm_89": ("mma",),
            "sm_90a": ("mma",)}


def architecture(capability: tuple[int, int]) -> str | None:
    """What to compile for, or None where the 1-bit tensor core is missing or only emulated."""
    name = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    return name if name in FAMILIES else None


def fitting(arch: str, rows: int, cout: int, multiprocessors: int) -> tuple[Kernel, ...]:
    """Kernels for so many rows and channels, the preferred first.

    The largest tile that still gives every multiprocessor a block: a large tile reads each operand
    fewer times, and one bit is consumed faster than L2 brings it.
    """
    found = []
    for kernel in MMA:
        if kernel.bn >= 2 * cout and kernel.bn > 32:
            continue  # half of it or more would be empty
        blocks = -(-rows // kernel.bm) * -(-cout // kernel.bn)
        if blocks >= multiprocessors or kernel.bm == 64:
            found.append(kernel)
    return tuple(found)
