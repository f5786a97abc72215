"""The kernels that csrc/cuda has, and on which architectures they are native.

A kernel is a class template of csrc/cuda with its tile; everything else about a call is in its
`Spec`. The names say family and tile: `mma_128x64` computes 128 pixels by 64 channels a block.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitkernels.backends.cuda import maps
from bitkernels.backends.cuda.spec import Spec

if TYPE_CHECKING:
    from bitkernels.backends.cuda.plan import Problem

WINDOW = 16  # bytes of a Window (layout.cuh)
MOMENTS = "packed_conv2d_moments"
MOST_TAPS = 32  # that a resident kernel's border classes name, a bit each
MOST_PAIRED = 1 << 14  # products: comparisons fit into 16 bits, 16 squares into 32
MOST_SHARED = 227 * 1024  # bytes of shared memory that a block of sm_90 can have
MOST_BOXES = 8  # images that a tile of a resident kernel touches, where bulk copies bring them


@dataclass(frozen=True)
class Kernel:
    name: str
    header: str
    type: str  # the C++ class, with THREADS and run(Params)
    bm: int
    bn: int
    threads: int
    shared: int  # bytes of dynamic shared memory, of a resident kernel those of any shape
    blocks: int  # that must fit on a multiprocessor: the register budget
    bulk: bool = False  # whether it takes tensor maps of both operands, for bulk copies
    persistent: bool = False  # whether a block computes many tiles
    groups: int = 0  # of a resident kernel: warpgroups of a block, each with tiles of its own
    # Whether it runs only near calls that a GPU has measured it on, or where its name is given: a
    # fault of its barriers would break the process's CUDA context, which no check could catch.
    measured_only: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def family(self) -> str:
        return self.name.split("_")[0].rstrip("0123456789")

    @property
    def resident(self) -> bool:
        """Whether filters stay in shared memory and everything is counted there: no `prepare`."""
        return self.groups > 0

    @property
    def windows(self) -> bool:
        """Whether `prepare` counts the bits of the rows too, not only of the filters."""
        return self.bulk and not self.resident

    def shared_bytes(self, spec: Spec) -> int:
        """Of dynamic shared memory for a call."""
        return self._resident_bytes(spec) if self.resident else self.shared

    @functools.lru_cache(maxsize=4096)  # noqa: B019  kernels are few
    def _resident_bytes(self, spec: Spec) -> int:
        filters = -(-spec.k_bytes // 128) * (self.bn + 16) * 128
        bare = not (spec.out_type or spec.packed)  # what the outputs are is not known yet
        each = 2 if spec.only_signs and not spec.threshold and not bare else 4
        lines = (spec.classes * each + 8 * 4) * self.bn
        totals = self.groups * 4 * 2 * self.bn * 8 if spec.moments else 0
        image = spec.image or self.placed(spec).image
        barriers = 16 * (self.groups + 1) if self.bulk else 0
        return filters + lines + totals + self.groups * 2 * image + barriers

    def placed(self, spec: Spec, aligned: bool = True) -> Spec:
        """With the places of a resident kernel's pixels; aligned: the words, to 16 bytes."""
        return spec.boxed(self.bm) if self.bulk else spec.resident(self.bm, aligned)

    def maps(self, spec: Spec, rows: int) -> tuple[maps.Geometry, maps.Geometry | None]:
        """Of words and filters, where bulk copies bring them."""
        if self.resident:
            return maps.lines(spec, rows // (spec.oh * spec.ow)), maps.filters(spec, self.bn)
        return (maps.matrix(rows, spec.k_bytes, self.bm),
                maps.matrix(spec.cout, spec.k_bytes, self.bn))

    def takes(self, problem: Problem) -> bool:
        return self.refusal(problem) is None

    def refusal(self, problem: Problem) -> str | None:
        """Of what these kernels take at all: why this one does not, as what it does, or None."""
        spec = problem.spec
        if problem.op == MOMENTS and not self.sums:
            return "takes no sums of its outputs"
        if self.windows and problem.op != "packed_linear":
            return "multiplies matrices, not images"
        if self.bulk and not problem.aligned:
            return ("copies only words that start at 16 bytes" if self.resident else
                    "copies only rows that start at 16 bytes and are a multiple of 16 bytes")
        if self.resident and spec.kh * spec.kw > MOST_TAPS:
            return f"takes at most {MOST_TAPS} taps"
        if self.resident and 8 * spec.k_bytes >= MOST_PAIRED:
            return f"takes fewer than {MOST_PAIRED} products an output"
        strips = self.bm // 64
        if problem.op == MOMENTS and strips * (8 * spec.k_bytes) ** 2 >= MOST_PAIRED ** 2:
            # The squares of 16 rows a strip.
            return f"takes sums of fewer than {math.isqrt(MOST_PAIRED ** 2 // strips)} products"
        if problem.op == MOMENTS:
            spec = spec.with_parts(("moments", 1))  # whose sums take shared memory
        if self.resident and self.bulk:
            spec = self.placed(spec)
            rows = max(problem.rows, spec.oh * spec.ow)
            if spec.boxes > MOST_BOXES:
                return f"takes tiles of at most {MOST_BOXES} images"
            if not self.maps(spec, rows)[0].legal:
                return "copies only lines of a multiple of 16 bytes, in boxes 256 elements wide"
        if self.shared_bytes(spec) > MOST_SHARED:
            return f"keeps filters and lines in {MOST_SHARED // 1024} KiB of shared memory"
        return None

    @property
    def sums(self) -> bool:
        """Whether it takes moments: registers hold sums of 64 channels."""
        return self.resident and self.bn == 64

    @property
    def source(self) -> str:
        arguments, call = "const __grid_constant__ Params p", "p"
        if self.bulk:
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


def _bulk(strips: int, bn: int, stages: int) -> Kernel:
    bm = 2 * strips * 64
    slot = 4 * bm + 7 * 4 * bn + 4 * (4 * bn + 64) + 2 * bn // 8
    shared = stages * (bm + bn) * 128 + 2 * slot + 16 * stages + 32
    return Kernel(f"bulk_{bm}x{bn}", "bulk_gemm.cuh", f"BulkGemm<2, {strips}, {bn}, {stages}>", bm,
                  bn, 384, shared, 1, bulk=True, persistent=True)


def _resident(bn: int, groups: int, strips: int, bulk: bool = False, turns: bool = False
              ) -> Kernel:
    """strips: of 64 rows, that a warpgroup's tile has. bulk: lines of pixels and filters come by
    bulk copies. turns: warpgroups queue their products one after the other."""
    bm = 64 * strips
    name = ("resident" if groups == 3 else f"resident{groups}") + f"_{bm}x{bn}" + "_bulk" * bulk
    return Kernel(name + "_turns" * turns, "resident.cuh",
                  f"Resident<{groups}, {bn}, {strips}{', true' * turns}>", bm, bn, 128 * groups, 0,
                  1, bulk=bulk, persistent=True, groups=groups, measured_only=turns)


MMA = (
    _mma(128, 128, 64, 64, 3, 2),
    _mma(128, 64, 32, 64, 4, 2),
    _mma(64, 64, 32, 32, 4, 3),
    _mma(64, 32, 16, 32, 4, 4),
)
BULK = (_bulk(1, 256, 4), _bulk(2, 128, 4), _bulk(1, 128, 6))
RESIDENT = tuple(_resident(bn, groups, strips, bulk) for bulk in (False, True)
                 for bn, groups, strips in ((128, 3, 1), (64, 3, 1), (64, 4, 1), (64, 3, 2)))
# Those tiles whose turns are expected to be fastest anywhere (docs/notebook/performance.md).
TURNS = (_resident(128, 3, 1, turns=True), _resident(64, 3, 2, turns=True))
PREPARE = Kernel("prepare", "prepare.cuh", "Prepare<8>", 8, 0, 256, 0, 6)
PEAK_MMA = Kernel("peak_mma", "peak.cuh", "Peak<false>", 0, 0, 256, 0, 1)
PEAK_WGMMA = Kernel("peak_wgmma", "peak.cuh", "Peak<true>", 0, 0, 256, 49152, 1)
ALL = {kernel.name: kernel for kernel in (*RESIDENT, *TURNS, *BULK, *MMA, PREPARE)}

FAMILIES = {"sm_80": ("mma",), "sm_86": ("mma",), "sm_87": ("mma",), "sm_89": ("mma",),
            "sm_90a": ("resident", "bulk", "mma")}


def architecture(capability: tuple[int, int]) -> str | None:
    """What to compile for, or None where the 1-bit tensor core is missing or only emulated."""
    name = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    return name if name in FAMILIES else None
