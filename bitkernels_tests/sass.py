"""Machine code of csrc/cuda: compiled without a GPU, taken apart, its control flow, its cost.

Costs follow the control flow: the code is cut into basic blocks, loops are found by their backward
branches, and of the ways through a region the one is counted that does all of its products and
accesses of global memory in the fewest instructions. So what only the first tile runs (the table),
or only thresholds with two bounds, or a tile past the end, is not counted.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bitkernels.backends.cuda import compiler, kernels

BRANCH = re.compile(r"^(BRA|BRX|JMP|CALL|EXIT|RET|KILL|BPT)\b")
PRODUCTS = ("BGMMA", "BMMA")
# What every way that counts does as often as any: copies and outputs, and products.
WORK = ("BGMMA", "STG", "LDG", "LDGSTS", "UTMALDG", "RED", "ATOMG")


@functools.cache
def disassembler() -> Path | None:
    """The one that comes with Triton."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def disassembled(code: bytes) -> list[str]:
    """Labels and instructions of a cubin, a line each."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("no nvdisasm; it comes with Triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        # Data flow is not analyzed, a quarter of the time: these kernels' text is the same.
        text = subprocess.run([tool, "-c", "-ndf", file.name], check=True, capture_output=True,
                              text=True).stdout
    return [line for line in text.splitlines()
            if re.search(r"/\*[0-9a-f]{4,}\*/|^\.L_x_\d+:", line)]


def instructions(code: bytes) -> list[str]:
    return [line for line in disassembled(code) if "/*" in line]


@dataclass(frozen=True)
class Built:
    lines: list[str]  # labels and instructions
    registers: int
    spilled: int  # bytes

    @property
    def code(self) -> list[str]:
        return [line for line in self.lines if "/*" in line]


def build(kernel: kernels.Kernel, spec, arch: str) -> Built:
    """Compiled by NVRTC. A warning, or products that had to wait for each other, is an error."""
    binary = compiler.compile(kernel.source, spec.header(), arch, cached=False)
    assert "serialized" not in binary.log and "warning" not in binary.log, binary.log
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", binary.log)
    registers = re.search(r"Used (\d+) registers", binary.log)
    assert spilled and registers, binary.log
    return Built(disassembled(binary.code), int(registers[1]), int(spilled[1]) + int(spilled[2]))


def touched_in_flight(code: list[str]) -> list[str]:
    """Instructions that use registers of a product which nothing has waited for yet."""
    flight: list[tuple[set[int], set[int]]] = []
    groups: list[int] = []
    found = []
    for line in code:
        text = re.sub(r"^.*?\*/\s*|@!?U?P\d+ ", "", line)
        product = re.match(r"BGMMA\.64x(\d+)x256\.AND\.POPC R(\d+), R(\d+), gdesc", text)
        wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text)
        if product:
            columns, sums, fragment = map(int, product.groups())
            flight.append((set(range(sums, sums + columns // 2)),
                           set(range(fragment, fragment + 4))))
            if "gsb0" in text:
                groups.append(len(flight))
        elif wait:
            while len(groups) > int(wait[1]):
                done = groups.pop(0)
                flight, groups = flight[done:], [n - done for n in groups]
        elif flight:
            registers = [int(r) for r in re.findall(r"\bR(\d+)\b", text)]
            op = text.split(" ")[0]
            width = 4 if ".128" in op or "LDSM" in op else 2 if "64" in op or "WIDE" in op else 1
            writes = not text.startswith(("ST", "RED", "BAR", "LDGSTS", "ISETP"))
            written = set(range(registers[0], registers[0] + width)) if registers and writes else ()
            busy, read = (set().union(*each) for each in zip(*flight, strict=True))
            if busy & {*registers, *written} or read & {*written}:
                found.append(line)
    return found


# Pipes.

UNIFORM = re.compile(r"^(U[A-Z0-9]+|R2UR|S2UR)\b")
PIPES = (
    ("tensor", re.compile(r"^(BGMMA|BMMA|IMMA|HMMA)")),
    ("lsu", re.compile(r"^(LD|ST|ATOM|RED|SHFL|LDSM|STSM|CCTL|MATCH)")),
    ("fma", re.compile(r"^(IMAD|FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|IDP)")),
    ("xu", re.compile(r"^(MUFU|POPC|FLO|BREV|I2F\b|F2I|I2I|F2F|S2R|CS2R)")),
    ("control", re.compile(r"^(BRA|BSSY|BSYNC|BAR|DEPBAR|LDGDEPBAR|EXIT|RET|CALL|NOP|WARPSYNC|"
                           r"WARPGROUP|SYNCS|FENCE|MEMBAR|ERRBAR|PREEXIT|ACQBULK|BMOV|YIELD|"
                           r"NANOSLEEP|USETMAXREG|ELECT|BREAK|BPT|KILL|VOTE|UTMA)")),
)
WINDOWS = ".WINDOWS"
NAMES = ("alu", "fma", "lsu", "uniform", "tensor", "xu", "control")


def opcode(line: str) -> str:
    """Marked where a product's windows come from shared memory too."""
    text = re.sub(r"^.*?\*/\s*", "", line).strip()
    text = re.sub(r"^@!?U?P(T|\d+)\s+", "", text)
    op = text.split(" ")[0].rstrip(";")
    if op.startswith("BGMMA") and not re.match(r"\S+ R\d+, R\d+, gdesc", text):
        return op + WINDOWS
    return op


def pipe(op: str) -> str:
    if op.startswith(("LDGDEPBAR", "UTMA", "USETMAXREG")):
        return "control"
    if UNIFORM.match(op):
        return "uniform"
    return next((name for name, match in PIPES if match.match(op)), "alu")


def wavefronts(op: str) -> float:
    """Of shared memory, without conflicts, that an instruction of a warp takes. The filters of a
    product, and its windows where they are not in registers, are read once for four warps."""
    if op.startswith("BGMMA"):
        shape = re.match(r"BGMMA\.64x(\d+)x256", op)
        assert shape
        return 32 * (int(shape[1]) + (64 if WINDOWS in op else 0)) / 128 / 4
    if op.startswith("LDSM"):
        return 4.0 if op.endswith(".4") else 2.0 if op.endswith(".2") else 1.0
    if op.startswith(("LDS", "STS", "LDGSTS")):
        return 4.0 if ".128" in op else 2.0 if ".64" in op else 1.0
    return 1.0 if op.startswith("SHFL") else 0.0


@dataclass
class Cost:
    """Of one warp: instructions by opcode, fractions where a loop runs so many times on average."""

    ops: Counter = field(default_factory=Counter)

    @property
    def total(self) -> float:
        return sum(self.ops.values())

    @property
    def work(self) -> float:
        return sum(n for op, n in self.ops.items() if op.split(".")[0] in WORK)

    def pipes(self) -> dict[str, float]:
        found: Counter = Counter()
        for op, n in self.ops.items():
            found[pipe(op)] += n
        return {name: found[name] for name in NAMES}

    def count(self, *names: str) -> float:
        return sum(n for op, n in self.ops.items() if op.split(".")[0] in names)

    def wavefronts(self) -> float:
        return sum(n * wavefronts(op) for op, n in self.ops.items())

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.ops + other.ops)

    def times(self, n: float) -> Cost:
        return Cost(Counter({op: n * count for op, count in self.ops.items()}))

    def minus(self, other: Cost) -> Cost:
        return Cost(self.ops - other.ops)


# Control flow.


@dataclass
class Block:
    ops: list[str]
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    head: int
    body: frozenset[int]
    latches: tuple[int, ...]


class Flow:
    """Basic blocks of a kernel, in the order of their addresses, and the loops among them."""

    def __init__(self, lines: list[str]) -> None:
        self.blocks: list[Block] = []
        labels: dict[str, int] = {}
        targets: list[tuple[int, str]] = []
        falls: dict[int, bool] = {}  # whether the next block may follow
        fresh = True
        for line in lines:
            label = re.match(r"^(\.L_x_\d+):", line)
            if label:
                if not fresh or not self.blocks or self.blocks[-1].ops:
                    self.blocks.append(Block([]))
                    fresh = True
                labels[label[1]] = len(self.blocks) - 1
                continue
            if fresh and not (self.blocks and not self.blocks[-1].ops):
                self.blocks.append(Block([]))
            fresh = False
            op = opcode(line)
            self.blocks[-1].ops.append(op)
            if op.split(".")[0] in PRODUCTS:  # regions end there
                falls[len(self.blocks) - 1] = fresh = True
                self.blocks.append(Block([]))
            if BRANCH.match(op):
                here, guarded = len(self.blocks) - 1, bool(re.search(r"\*/\s*@", line))
                target = re.search(r"`\((\.L_x_\d+)\)", line)
                if target:
                    targets.append((here, target[1]))
                # A branch on a uniform predicate has it as an operand.
                guarded = guarded or op.startswith("BRA.") or ", `" in line
                # A call is one that returns, or a way out of a loop.
                guarded = guarded or op.startswith("CALL")
                falls[here] = guarded
                fresh = True
                self.blocks.append(Block([]))
        for i in range(len(self.blocks) - 1):
            if falls.get(i, True):
                self.blocks[i].next.append(i + 1)
        for i, to in targets:
            if to in labels:
                self.blocks[i].next.append(labels[to])
        self.loops = self._loops()

    def reachable(self, start: int, within: Iterable[int] | None = None) -> set[int]:
        inside = None if within is None else set(within)
        found, todo = {start}, [start]
        while todo:
            for n in self.blocks[todo.pop()].next:
                if n not in found and (inside is None or n in inside):
                    found.add(n)
                    todo.append(n)
        return found

    def _loops(self) -> list[Loop]:
        """Natural loops, the outer ones first."""
        reach = self.reachable(0)
        before: dict[int, list[int]] = {b: [] for b in reach}
        for b in reach:
            for n in self.blocks[b].next:
                before[n].append(b)
        over = {b: set(reach) for b in reach}
        over[0] = {0}
        changed = True
        while changed:
            changed = False
            for b in sorted(reach - {0}):
                new = set.intersection(*(over[p] for p in before[b])) | {b}
                if new != over[b]:
                    over[b], changed = new, True
        found: dict[int, tuple[set[int], list[int]]] = {}
        for b in reach:
            for head in self.blocks[b].next:
                if head not in over[b]:
                    continue
                body, latches = found.setdefault(head, ({head}, []))
                latches.append(b)
                todo = [b]
                while todo:
                    at = todo.pop()
                    if at not in body:
                        body.add(at)
                        todo += before[at]
        loops = [Loop(head, frozenset(body), tuple(latches))
                 for head, (body, latches) in found.items()]
        return sorted(loops, key=lambda loop: -len(loop.body))

    def has(self, blocks: Iterable[int], *names: str) -> bool:
        return any(op.split(".")[0] in names for b in blocks for op in self.blocks[b].ops)

    def children(self, within: Iterable[int], but: Loop | None = None) -> list[Loop]:
        """The outermost loops inside a set of blocks."""
        inside, found = set(within), []
        taken: set[int] = set()
        for loop in self.loops:
            if loop != but and loop.body <= inside and not loop.body & taken:
                found.append(loop)
                taken |= loop.body
        return found

    def way(self, start: int, ends: Iterable[int], within: Iterable[int],
            trips: Callable[[Loop, Cost], float], but: Loop | None = None,
            wanted: Callable[[Cost], float] = lambda cost: cost.work) -> Cost:
        """The cost of the way from `start` to the end of one of `ends`, of those within a set of
        blocks: most `wanted`, then fewest instructions. Loops count as often as `trips` says,
        given them and the cost of one round; `but` is the loop that the set is the body of."""
        inside, ends = set(within), set(ends)
        outer: dict[int, Loop] = {}
        for loop in self.children(inside, but):
            for b in loop.body:
                outer[b] = loop

        def name(b: int) -> int:
            return outer[b].head if b in outer else b

        costs: dict[int, Cost] = {}

        def cost(b: int) -> Cost:
            if b not in costs:
                if b in outer:
                    loop = outer[b]
                    once = self.way(loop.head, loop.latches, loop.body, trips, loop, wanted)
                    costs[b] = once.times(trips(loop, once))
                else:
                    costs[b] = Cost(Counter(self.blocks[b].ops))
            return costs[b]

        best: dict[int, tuple[tuple[float, float], Cost] | None] = {}

        def follow(b: int) -> tuple[tuple[float, float], Cost] | None:
            if b in best:
                return best[b]
            best[b] = None  # a way that comes back here is none
            members = outer[b].body if b in outer else {b}
            options = [Cost()] if members & ends else []
            after = {name(n) for m in members for n in self.blocks[m].next
                     if n in inside and n not in members and not (but and n == but.head)}
            for n in after:
                rest = follow(n)
                if rest is not None:
                    options.append(rest[1])
            if options:
                found = [cost(b) + option for option in options]
                best[b] = max((((wanted(c), -c.total), c) for c in found), key=lambda x: x[0])
            return best[b]

        result = follow(name(start))
        if result is None:
            raise ValueError("no way through the region")
        return result[1]
