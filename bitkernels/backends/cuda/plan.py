"""Which kernels a call may run, and which of them first: from measurements, else from a model.

`measured.json` holds what `benchmarks/gpu/check.py` measured on GPUs: by architecture the GPU, the
day, and one entry a call, with the microseconds of Triton and of each kernel that was right:

    {"sm_90a": {"gpu": ..., "date": ..., "calls": [{"op": "packed_conv2d", "rows": 50176,
     "cout": 256, "products": 2304, "real": false, "us": {"triton": ..., "resident_64x128": ...}}]}}

A kernel runs unasked only near calls that it was measured on and where it was faster than Triton.
Kernels that no check can make safe (`Kernel.measured_only`) run by BITKERNELS_CUDA=1, too, only
near calls that they were measured on.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitkernels.backends.cuda import kernels
from bitkernels.backends.cuda.kernels import Kernel
from bitkernels.backends.cuda.spec import Spec

MEASURED = Path(__file__).parent / "measured.json"
NEXT = "triton"  # the backend that runs what these kernels do not
NEAR = 2.0  # factors of two between a call and a measured one, of all three sizes together


@dataclass(frozen=True)
class Problem:
    """What a choice may depend on."""

    op: str
    spec: Spec
    rows: int  # output pixels
    real: bool  # whether a real output is written
    # As bulk copies want them: words start at 16 bytes; of matrices both operands, and their rows.
    aligned: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.rows, self.spec.cout, 8 * self.spec.k_bytes


@dataclass(frozen=True)
class Measured:
    """A call on one GPU, and how far from it."""

    gpu: str
    date: str
    us: Mapping[str, float]
    distance: float

    def order(self, found: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        """The measured ones first, by their times."""
        return tuple(sorted(found, key=lambda kernel: self.us.get(kernel.name, math.inf)))

    def faster(self, found: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        """Those that were faster than the next backend."""
        limit = self.us.get(NEXT, 0.0)
        return tuple(k for k in self.order(found) if self.us.get(k.name, math.inf) < limit)

    def lost(self, found: tuple[Kernel, ...], problem: Problem) -> str:
        """Of the fastest measured kernel, where it is none of these: that, and why."""
        best = next(iter(self.faster(tuple(kernels.ALL[name] for name in self.us
                                           if name in kernels.ALL))), None)
        if best is None or best in found:
            return ""
        return f"{best.name}, the fastest measured near this shape, {best.refusal(problem)}"

    def said(self, kernel: Kernel) -> str:
        time, rival = self.us.get(kernel.name), self.us.get(NEXT)
        if time is None or rival is None:
            return "unproven near this shape, by BITKERNELS_CUDA=1"
        return (f"measured near this shape at {time:.4g} us, {NEXT} {rival:.4g} us "
                f"({self.gpu}, {self.date})")


@functools.cache
def table() -> dict[str, dict]:
    return json.loads(MEASURED.read_text())


def gains(arch: str) -> list[float]:
    """How many times as fast as the next backend these kernels were, where they were faster."""
    found = []
    for call in table().get(arch, {"calls": ()})["calls"]:
        own = min((t for name, t in call["us"].items() if name != NEXT), default=math.inf)
        found.append(call["us"].get(NEXT, 0.0) / own)
    return [gain for gain in found if gain > 1]


def nearest(arch: str, problem: Problem) -> Measured | None:
    """The measured call most like this one, or None if none is near."""
    entry = table().get(arch, {"calls": ()})
    best = None
    for call in entry["calls"]:
        if (call["op"], call["real"]) != (problem.op, problem.real):
            continue
        distance = sum(abs(math.log2(a / b)) for a, b in zip(
            problem.sizes, (call["rows"], call["cout"], call["products"]), strict=True))
        if distance <= NEAR and (best is None or distance < best.distance):
            best = Measured(entry["gpu"], entry["date"], call["us"], distance)
    return best


def allowed(found: tuple[Kernel, ...], measured: Measured | None) -> tuple[Kernel, ...]:
    """Of kernels that nobody has named: without those that a GPU must have measured near the call,
    and has not."""
    us = {} if measured is None else measured.us
    return tuple(kernel for kernel in found if kernel.name in us or not kernel.measured_only)


# Products a clock and multiprocessor that a kernel is expected to reach at best, in tenths of
# wgmma's 32768. Derived from how often a tile reads its operands from L2 and shared memory
# (docs/notebook/performance.md). On an H200 (2026-11-26) most fell short: epilogues are the limit.
RATES = {"resident_64x128": 8.9, "resident_64x64": 8, "resident4_64x64": 8,
         "resident_128x64": 8.5, "resident_64x128_bulk": 8.9, "resident_64x64_bulk": 8,
         "resident4_64x64_bulk": 8, "resident_128x64_bulk": 8.5,
         "resident_64x128_turns": 8.9, "resident_128x64_turns": 8.5,
         "bulk_128x256": 10, "bulk_256x128": 9.5, "bulk_128x128": 8,
         "mma_128x128": 5, "mma_128x64": 4, "mma_64x64": 3, "mma_64x32": 2}
PREPARED = 4000  # clocks that a launch of `prepare` costs, about


@functools.lru_cache(maxsize=4096)
def modelled(families: tuple[str, ...], problem: Problem, multiprocessors: int
             ) -> tuple[Kernel, ...]:
    """The kernels of these families that take a call, the one expected to be fastest first."""
    rows, cout, products = problem.sizes

    def clocks(kernel: Kernel) -> float:
        tiles = max(1, -(-rows // kernel.bm) * -(-cout // kernel.bn))
        side_by_side = min(kernel.groups or kernel.blocks, -(-tiles // multiprocessors))
        rounds = -(-tiles // (multiprocessors * side_by_side))
        work = rounds * side_by_side * kernel.bm * kernel.bn * products
        return work / (3276.8 * RATES[kernel.name]) + (0 if kernel.resident else PREPARED)

    found = [k for k in kernels.ALL.values()
             if k.family in families and k.takes(problem)]
    return tuple(sorted(found, key=clocks))
