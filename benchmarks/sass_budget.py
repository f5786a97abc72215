"""What the kernels of csrc/cuda cost in machine code, against budgets. Needs no GPU.

    python benchmarks/sass_budget.py [--only PATTERN] [--pipes]

Every case is compiled by NVRTC. Its tile loop is cut at the last product, by control flow
(bitkernels_tests/sass.py). Columns: registers, bytes spilled, instructions of a warp in the
prologue with the table (with the loops that copy filters and pixels as often as they run; of the
warp that has most, and on average), in what the first tile does besides, in each tile up to the
last product and after it, there by output of a lane, and wavefronts of shared memory a tile. `!`
marks what is over its budget; the exit status says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitkernels.backends.cuda import kernels
from bitkernels.backends.cuda.spec import TYPES, Spec, conv_spec, linear_spec
from bitkernels_tests import sass
from bitkernels_tests.sass import Cost, Flow, Loop

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH = 256
SIZES = (4096, 8192, 16384)
FLOAT16, INT16 = 3, TYPES[next(t for t in TYPES if str(t) == "torch.int16")]
OUTPUTS = {
    "signs": dict(packed=1, threshold=1),
    "fp16": dict(out_type=FLOAT16, scale=1),
    "block": dict(out_type=FLOAT16, packed=1, residual=FLOAT16, scale=1, bias=1, shift_in=1,
                  slope=1, shift_out=1, sign_shift=1),
    "moments": dict(out_type=INT16, moments=1),
}


@dataclass(frozen=True)
class Budget:
    """The most that is allowed; nothing may be spilled."""

    an_output: float  # instructions of the epilogue an output
    before: float = 10**6  # of a warp and tile up to the last product
    waves: float = 10**6  # wavefronts of shared memory, of a tile
    prologue: float = 10**6  # of the warp that has most, with the table
    mean: float = 10**6  # of a warp on average


# By kernel, call and output; the first pattern that fits. What the machine code has and a little
# room, so that a step back is seen; wavefronts as they are. The design asks for 160 instructions
# before the epilogue of 256@14 and for 150 in the prologue, which a warp of the kernels with bulk
# copies has on average but at 512@7. Of a resident kernel: by output what it costs an output, and
# in wavefronts beside signs; by layer what comes before it, and the wavefronts of signs.
BUDGETS: tuple[tuple[str, Budget], ...] = tuple(
    (f"{kernel} {layer} {output}", Budget(an_output, before, waves + more))
    for kernel, outputs, layers in (
        ("resident_128x64",
         {"signs": (2.8, 0), "fp16": (5.4, 168), "block": (15.6, 504), "moments": (6.8, 104)},
         {"64@56": (225, 496), "128@28": (300, 676), "256@14": (355, 1008), "512@7": (535, 1788)}),
        ("resident4?_64x64",
         {"signs": (3.1, 0), "fp16": (5.6, 116), "block": (16.5, 444), "moments": (7, 52)},
         {"64@56": (190, 296), "128@28": (170, 360), "256@14": (235, 548), "512@7": (310, 916)}),
        ("resident_64x128",
         {"signs": (2.8, 0), "fp16": (5.4, 236), "block": (15.9, 892)},
         {"128@28": (165, 512), "256@14": (260, 764), "512@7": (330, 1276)}),
        ("resident_128x64_turns",
         {"signs": (3.1, 0), "fp16": (5.4, 168), "block": (15.8, 504), "moments": (6.6, 104)},
         {"64@56": (240, 496), "128@28": (275, 676), "256@14": (320, 1008), "512@7": (510, 1788)}),
        ("resident_64x128_turns",
         {"signs": (3, 0), "fp16": (5.4, 236), "block": (15.9, 892)},
         {"128@28": (175, 512), "256@14": (235, 764), "512@7": (295, 1276)}))
    for layer, (before, waves) in layers.items()
    for output, (an_output, more) in outputs.items()
) + tuple(
    (rf"resident\d?_64.*_bulk {layer} signs", Budget(3.2, before, prologue=most, mean=mean))
    for layer, before, most, mean in (("64@56", 135, 210, 150), ("128@28", 130, 195, 133),
                                      ("256@14", 145, 213, 140), ("512@7", 195, 243, 165))
) + tuple(
    (rf"resident\d?_64.*_bulk {layer} {output}",
     Budget(an_output, before, prologue=most, mean=mean))
    for layer, before, most, mean in (("64@56", 150, 285, 206), ("128@28", 155, 250, 190),
                                      ("256@14", 165, 265, 196), ("512@7", 210, 295, 210))
    for output, an_output in (("block", 16.5), ("fp16", 5.6), ("moments", 7.5))
) + tuple(
    (f"resident_128x64_bulk {layer} {output}",
     Budget(an_output, before, waves + more, most, signs if output == "signs" else mean))
    for layer, before, waves, most, signs, mean in (
        ("64@56", 205, 400, 267, 150, 188), ("128@28", 205, 536, 210, 117, 169),
        ("256@14", 240, 824, 215, 125, 177), ("512@7", 335, 1472, 236, 140, 192))
    for output, an_output, more in (("signs", 3.1, 0), ("fp16", 5.6, 168), ("block", 16.2, 504),
                                    ("moments", 7, 104))
) + (
    ("bulk_128x128 .* packed", Budget(4.4)), ("bulk_128x128 .* fp16", Budget(7.5)),
    ("bulk.* packed", Budget(4)), ("bulk.* fp16", Budget(6.8)),
    ("mma.* signs", Budget(22)), ("mma.* block", Budget(38)), ("mma.* packed", Budget(11)),
    ("mma.* gemm .* fp16", Budget(11.5)), ("mma.* fp16", Budget(19.5)),
)


@dataclass(frozen=True)
class Case:
    kernel: kernels.Kernel
    call: str
    output: str
    spec: Spec
    rows: int
    arch: str = "sm_90a"

    @property
    def name(self) -> str:
        arch = "" if self.arch == "sm_90a" else f" {self.arch}"
        return f"{self.kernel.name} {self.call} {self.output}{arch}"

    @property
    def budget(self) -> Budget:
        return next(b for pattern, b in BUDGETS if re.search(pattern, self.name))

    @property
    def strips(self) -> int:
        """Fragments of 16 rows that a warp has of a tile."""
        sizes = [int(n) for n in re.findall(r"\d+", self.kernel.type)]
        if self.kernel.family == "mma":
            return sizes[2] // 16
        return self.kernel.bm // 64 if self.kernel.resident else sizes[1]

    @property
    def columns(self) -> int:
        """Channels that a warp has of a tile."""
        return (int(re.findall(r"\d+", self.kernel.type)[3]) if self.kernel.family == "mma"
                else self.kernel.bn)

    @property
    def outputs(self) -> int:
        """Of a lane and tile."""
        return self.strips * 16 * self.columns // 32

    @property
    def products(self) -> int:
        """Tensor-core instructions of a warp and tile."""
        each = self.columns // 8 if self.kernel.family == "mma" else 1
        steps = -(-self.spec.k_bytes // 32)
        return each * self.strips * (-(-steps // 2) * 2 if self.kernel.family == "mma" else steps)

    @property
    def fills(self) -> float:
        """Copies of filters by a thread of a resident kernel, at launch."""
        size = 16 if self.spec.chunk == 16 else 4
        return self.kernel.bn * -(-self.spec.k_bytes // 32) * 32 / size / self.kernel.threads

    @property
    def fetches(self) -> int:
        """Copies of pixels by a thread of a resident kernel, each tile (copy_lines)."""
        s = self.spec
        size, lead = getattr(s, "line_chunk", s.chunk), getattr(s, "lead", s.pl)  # of older trees
        chunks, lines = s.w * s.pixel // size, (s.image // s.pixel - lead) // s.wp
        across = next(n for n in (32, 16, 8, 4, 2) if chunks > n // 2 or n == 2)
        return -(-lines // (128 // across)) * -(-chunks // 32)


@dataclass(frozen=True)
class Measured:
    """Of a case, by its machine code."""

    case: Case
    registers: int
    spilled: int
    roles: dict[str, tuple[int, Cost]]  # in the prologue: warps that have it, and what they do
    table: Cost  # what the first tile does besides
    before: Cost
    epilogue: Cost
    turns: bool  # whether warpgroups wait for each other before they multiply

    @property
    def prologue(self) -> Cost:
        """Of the warp that has most."""
        return max((cost for _, cost in self.roles.values()), key=lambda cost: cost.total)

    @property
    def mean_prologue(self) -> float:
        warps = sum(n for n, _ in self.roles.values())
        return sum(n * cost.total for n, cost in self.roles.values()) / warps

    @property
    def an_output(self) -> float:
        return self.epilogue.total / self.case.outputs

    @property
    def wavefronts(self) -> float:
        """Of a tile, by all its warps."""
        warps = 4 if self.case.kernel.resident else 8 if self.case.kernel.persistent else 4
        return warps * (self.before + self.epilogue).wavefronts()

    @property
    def over(self) -> list[str]:
        budget = self.case.budget
        return [name for name, found, most in (
            ("spilled", self.spilled, 0), ("prologue", self.prologue.total, budget.prologue),
            ("mean", self.mean_prologue, budget.mean),
            ("before", self.before.total, budget.before),
            ("output", self.an_output, budget.an_output),
            ("waves", self.wavefronts, budget.waves)) if found > most]


def roles_of(case: Case, flow: Flow, region: set[int], entries: list[int],
             trips: Callable[[Loop, Cost], float]) -> dict[str, tuple[int, Cost]]:
    """Of a resident kernel with bulk copies: the first warpgroups make the table, the next one
    prepares its channels' values, the last one (often the same) brings what they multiply."""
    def way(wanted: tuple[str, ...], without: tuple[str, ...], within: set[int]) -> Cost:
        def has(b: int, *names: str) -> bool:
            return any(op.startswith(names) for op in flow.blocks[b].ops)

        kept = {b for b in within if not without or not has(b, *without)}
        return flow.way(0, [b for b in entries if b in kept], kept, trips, wanted=lambda cost: sum(
            n for op, n in cost.ops.items() if op.startswith(wanted)))

    groups, tables, threads = case.kernel.groups, case.kernel.bn // 64, case.kernel.threads
    copies, barriers, maps = ("UTMALDG", "UBLKCP"), "SYNCS.EXCH", "UTMACCTL"
    # Units of 8 bytes are copied by all warps, but for those of one warpgroup that makes the table.
    free = tables == 1 and case.spec.pixel % 16 == 8
    copied = () if free else ("LDGSTS",)
    lines = {b for b in region if flow.has((b,), "UTMALDG") and not flow.has((b,), "UBLKCP")}
    # Of the last warpgroup the third warp makes the mbarriers too, the fourth brings the filters.
    apart = groups > tables + 1  # a warpgroup for the values
    values, no_values = ((), ("LDG.",)) if apart else (("LDG", "STS.U16"), ())
    found = {
        "table": (4 * tables, way(("BGMMA", *copied), (*copies, barriers, maps, "LDG."), region)),
        "lines": (2, way(("LDGSTS", "UTMALDG", *values),
                         ("BGMMA", "UBLKCP", barriers, maps, *no_values), region)),
        "lines, barriers": (1, way(("LDGSTS", "UTMALDG", barriers, *values),
                                   ("BGMMA", "UBLKCP", maps, *no_values), region)),
        "filters": (1, way(("LDGSTS", *copies, maps, "STS.128", *values),
                           ("BGMMA", barriers, *no_values),
                           region if groups > 3 else region - lines))}
    if apart:  # a warp for 32 channels
        found["values"] = (2, way(("LDG", "STS"), ("BGMMA", *copies, barriers, maps), region))
    rest = threads // 32 - sum(n for n, _ in found.values())
    if rest:
        found["neither"] = (rest, way(("LDGSTS",), (
            "BGMMA", "LDG.", *copies, barriers, maps), region))
    return found


def measure(case: Case) -> Measured:
    built = sass.build(case.kernel, case.spec, case.arch)
    flow = Flow(built.lines)
    everything = flow.reachable(0)
    product = "BGMMA" if flow.has(everything, "BGMMA") else "BMMA"

    def has_products(blocks) -> bool:
        return flow.has(blocks, product)

    holders = [loop for loop in flow.loops if has_products(loop.body)]
    # The loop over K of a kernel that computes one tile is no loop over tiles.
    tiles = next(iter(holders), None) if case.kernel.persistent else None
    body = tiles.body if tiles else frozenset(everything)
    inner = [loop for loop in flow.children(body, tiles) if has_products(loop.body)]
    looped = frozenset().union(*(loop.body for loop in inner))
    outside = sum(op.startswith(product) for b in body - looped for op in flow.blocks[b].ops)
    committed = next((b for b in sorted(everything) if flow.has((b,), "LDGDEPBAR")), 0)

    def trips(loop: Loop, once: Cost) -> float:
        if loop in inner:
            return max(1.0, (case.products - outside) / once.count(product))
        if case.kernel.resident and once.count("LDGSTS"):
            needed = case.fills if loop.head < committed else case.fetches
            return max(1.0, needed / once.count("LDGSTS"))
        if product == "BGMMA" and once.count("BMMA"):  # of the table; 8 warps have all channels
            return max(1.0, case.products / case.strips * case.kernel.bn / 64 / once.count("BMMA"))
        return 1.0

    def wanted(cost: Cost) -> float:
        return cost.count(*sass.WORK, product)

    def and_table(cost: Cost) -> float:  # whose corrections are products of another kind
        return cost.count("BMMA") + wanted(cost)

    last = max(b for b in body if has_products((b,)))
    if tiles:
        entries = [b for b in everything - body if tiles.head in flow.blocks[b].next]
        if flow.has(everything - body, "UBLKCP"):
            roles = roles_of(case, flow, everything - body, entries, trips)
        else:
            prologue = flow.way(0, entries, everything - body, trips, wanted=and_table)
            roles = {"all": (case.kernel.threads // 32, prologue)}
        start, ends = tiles.head, tiles.latches
    else:
        start = 0
        first = inner[0].head if inner else min(b for b in body if has_products((b,)))
        entries = [b for b in everything - looped if first in flow.blocks[b].next]
        prologue = flow.way(0, entries, everything - looped, trips, wanted=wanted)
        roles = {"all": (case.kernel.threads // 32, prologue)}
        ends = tuple(b for b in everything if not flow.blocks[b].next)
    whole = flow.way(start, ends, body, trips, tiles, wanted)
    before = flow.way(start, {last}, body, trips, tiles, wanted)
    table = Cost()
    if tiles and product == "BGMMA" and flow.has(body, "BMMA"):
        table = flow.way(start, ends, body, trips, tiles, and_table).minus(whole)
    epilogue = whole.minus(before)
    if not tiles:
        before = before.minus(prologue)
    turns = any(op.startswith("BAR.ARV") for b in body for op in flow.blocks[b].ops)
    return Measured(case, built.registers, built.spilled, roles, table, before, epilogue, turns)


def conv_case(kernel: kernels.Kernel, channels: int, size: int, output: str,
              arch: str = "sm_90a") -> Case:
    words = channels // 32
    spec = conv_spec((BATCH, channels, size, size), (size, size), (channels, 3, 3, words), channels,
                     (1, 1), (1, 1, 1, 1), (1, 1), min(16, 4 * words))
    spec = replace(spec, **OUTPUTS[output])
    if kernel.resident:
        spec = kernel.placed(spec)
    return Case(kernel, f"{channels}@{size}", output, spec, BATCH * size * size, arch)


def product_case(kernel: kernels.Kernel, size: int, output: str, arch: str = "sm_90a") -> Case:
    spec = replace(linear_spec(size // 32, size, size, 16), windows=int(kernel.windows),
                   **(dict(packed=1) if output == "packed" else dict(out_type=FLOAT16)))
    return Case(kernel, f"gemm {size}", output, spec, size, arch)


def cases() -> Iterator[Case]:
    for kernel in (*kernels.RESIDENT, *kernels.TURNS):
        for channels, size in LAYERS:
            if kernel.bn > channels:
                continue
            for output in OUTPUTS:
                if output != "moments" or kernel.sums:
                    yield conv_case(kernel, channels, size, output)
    for kernel in kernels.BULK:
        for size in SIZES:
            for output in ("packed", "fp16"):
                yield product_case(kernel, size, output)
    for kernel in kernels.MMA:
        for arch in ("sm_80", "sm_86", "sm_89"):
            for output in ("signs", "fp16", "block"):
                yield conv_case(kernel, 256, 14, output, arch)
            for output in ("packed", "fp16"):
                yield product_case(kernel, 8192, output, arch)


HEAD = (f"{'kernel, call, output':46}{'regs':>5}{'spill':>6}{'prol':>6}{'mean':>6}{'table':>6}"
        f"{'before':>7}{'epil':>6}{'/out':>6}{'budget':>7}{'waves':>7}")


def line(m: Measured, pipes: bool = False, roles: bool = False) -> str:
    def mark(name: str) -> str:
        return "!" if name in m.over else " "

    text = (f"{m.case.name:46}{m.registers:5}{m.spilled:5}{mark('spilled')}{m.prologue.total:6.0f}"
            f"{mark('prologue')}{m.mean_prologue:5.0f}{mark('mean')}{m.table.total:6.0f}"
            f"{m.before.total:6.0f}{mark('before')}"
            f"{m.epilogue.total:6.0f}{m.an_output:6.2f}{mark('output')}"
            f"{m.case.budget.an_output:6.1f}{m.wavefronts:7.0f}{mark('waves')}")
    if pipes:
        text += "".join(f"\n    {what:8}" + " ".join(f"{n} {v:.0f}" for n, v in c.pipes().items())
                        for what, c in (("before", m.before), ("epilogue", m.epilogue)))
    if roles:
        text += "".join(f"\n    {n:2} warps, {what:16}{cost.total:5.0f}"
                        for what, (n, cost) in m.roles.items())
    return text + ("  FAIL " + ", ".join(m.over) if m.over else "  PASS")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression of cases")
    parser.add_argument("--pipes", action="store_true", help="instructions by pipe too")
    parser.add_argument("--roles", action="store_true", help="the prologue of different warps too")
    args = parser.parse_args()
    chosen = [case for case in cases() if re.search(args.only, case.name)]
    print(HEAD)
    failed = 0
    with ThreadPoolExecutor() as pool:
        for found in pool.map(measure, chosen):
            print(line(found, args.pipes, args.roles), flush=True)
            failed += bool(found.over)
    print(f"{len(chosen) - failed} of {len(chosen)} within their budgets")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
