"""Times of csrc/cuda's Hopper kernels from their machine code, without a GPU: predictions.

    python benchmarks/kernel_model.py                                   # of this tree
    python benchmarks/kernel_model.py --measured FOLDER [--tree FOLDER]  # beside measured times

FOLDER has the conv.jsonl and gemm.jsonl that benchmarks/gpu/check.py wrote; --tree is an unpacked
older tree (`git archive REVISION bitkernels csrc`, and bitkernels/_C*) whose kernels they measured.

    time = max(launch + prologue + rounds x round, bytes / copy)

In a round each warpgroup of a multiprocessor has one tile. The groups run in phase, as Nsight
Compute showed: all multiply, then all are in their epilogues. So a round takes the tensor core's
clocks of all its tiles, and for each instruction of a tile the clocks after which a warp issues its
next, more the more warps there are; but no less than the issue slots, the ALU (two clocks an
instruction) or the data pipe of L1 and shared memory allow. Groups that multiply in turn (kernels
`*_turns`) overlap with each other: each of their rounds but the last takes the products of all
tiles, or one tile's products and instructions, whichever is longer. Conflicts of banks, the time
that bytes and instructions do not overlap, and clocks that fall under load are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

if "--tree" in sys.argv:
    sys.path.insert(0, sys.argv[sys.argv.index("--tree") + 1])
import bitkernels  # noqa: F401  the older tree's, if there is one

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sass_budget
from sass_budget import Case, Measured, kernels

# Of an H200.
CLOCK = 1.70e3  # a microsecond, as Nsight Compute saw it while the tensor core works
MULTIPROCESSORS = 132
COPY = 4.19e6  # bytes a microsecond of a copy
# Calibrated on one call: 64@56, signs, in resident_64x64 and resident4_64x64, at batches 256 and 1;
# SUMS on moments of the same at batch 1.
LAUNCH = 0.6  # us: launch, first loads, drain
SUMS = 3.5  # us, of moments: a launch before, which zeros the sums, and adding them up at the end
ALONE, BESIDE = 2.6, 0.6  # clocks an instruction of a warp, and for each warp of its scheduler
# Of the data pipe's wavefronts, without conflicts, in the Nsight report of 64@56 block.
REACHED = 0.83
ISSUE = 0.95  # the most instructions a clock of a scheduler
OFF = 0.2  # beyond it a prediction is marked


def wavefronts(m: Measured) -> float:
    """A tile's on the data pipe: shared memory's, and 8 for a 16-byte access to global memory by a
    warp, whose rows of 64 bytes are of 8 pixels."""
    warps = 4 if m.case.kernel.resident else 8
    ops = (m.before + m.epilogue).ops
    wide = sum(n for op, n in ops.items() if op.split(".")[0] in ("LDG", "STG") and ".128" in op)
    narrow = sum(n for op, n in ops.items() if op.split(".")[0] in ("LDG", "STG")) - wide
    return m.wavefronts + warps * (8 * wide + 2 * narrow)


def tensor(case: Case) -> float:
    """Clocks of a tile's products: half of N each."""
    columns = case.kernel.bn + (16 if case.kernel.resident else 0)
    groups = 1 if case.kernel.resident else 2
    return groups * case.products * columns / 2


def latency(warps: int) -> float:
    """Clocks from issue to issue of a warp that does not wait for products."""
    return ALONE + BESIDE * warps


def round_parts(m: Measured, groups: int, more: bool = False) -> dict[str, float]:
    """Clocks of a round with so many tiles a multiprocessor, by what bounds it; more: whether
    another round comes."""
    tile = m.before + m.epilogue
    if m.case.kernel.resident:
        warps, products = groups, groups * tensor(m.case)
        serial = products + tile.total * latency(warps)
        if more and m.turns:
            serial = max(products, tensor(m.case) + tile.total * latency(warps))
    else:  # products are queued ahead, so that what comes before the last of them costs nothing
        warps, products = 2, tensor(m.case)
        serial = products + m.epilogue.total * latency(warps)
    return {"products, latency": serial, "issue": warps * tile.total / ISSUE,
            "ALU": warps * 2 * tile.pipes()["alu"],
            "wavefronts": groups * wavefronts(m) / REACHED}


def predict(m: Measured, rows: int) -> tuple[float, str]:
    """(microseconds, what bounds it)."""
    case, kernel = m.case, m.case.kernel
    groups = kernel.groups or 1
    tiles = -(-rows // kernel.bm) * -(-case.spec.cout // kernel.bn)
    rounds, rest = divmod(tiles, MULTIPROCESSORS * groups)
    clocks = m.prologue.total * latency(kernel.threads // 128)
    # Older kernels make the table in the first tile, while its products run.
    first = min(groups, -(-tiles // MULTIPROCESSORS)) * tensor(case)
    clocks += max(0.0, m.table.total * latency(kernel.threads // 128) - first)
    full = round_parts(m, groups, more=True)
    bound = max(full, key=lambda name: full[name])
    if rounds and not rest:
        clocks += (rounds - 1) * full[bound] + max(round_parts(m, groups).values())
    else:
        clocks += rounds * full[bound]
    if rest:
        last = round_parts(m, min(groups, -(-rest // MULTIPROCESSORS)))
        clocks += max(last.values())
        if not rounds:
            bound = max(last, key=lambda name: last[name])
    launches = LAUNCH * (1 if kernel.resident else 2) + (SUMS if case.spec.moments else 0)
    time, bytes_ = launches + clocks / CLOCK, moved(case, rows) / COPY
    return max((time, bound), (bytes_, "bytes"))


def moved(case: Case, rows: int) -> int:
    """Bytes that must move."""
    s = case.spec
    sizes = {0: 0, 1: 4, 2: 4, 3: 2, 4: 2, 5: 2}
    words = rows * s.sh * s.sw * s.pixel
    bits = 8 * (sizes[s.out_type] + sizes[s.residual]) + s.packed
    return words + s.cout * s.k_bytes + rows * s.cout * bits // 8


NAMES = {"packed": "signs", "fp16": "fp16", "block": "block", "moments int16": "moments"}


def calls() -> Iterator[tuple[Case, int, str]]:
    """(case, rows, key of the measured call)."""
    for batch in (256, 64, 1):
        for channels, size in sass_budget.LAYERS:
            for name, output in NAMES.items():
                for kernel in (*kernels.RESIDENT, *kernels.TURNS):
                    if kernel.bn > channels or output == "moments" and not kernel.sums:
                        continue
                    case = sass_budget.conv_case(kernel, channels, size, output)
                    if output == "fp16":  # the timed call has no scale
                        case = replace(case, spec=replace(case.spec, scale=0))
                    yield case, batch * size * size, f"3x3:{channels}@{size} batch {batch} {name}"
    for size in sass_budget.SIZES:
        for output in ("packed", "fp16"):
            for kernel in kernels.BULK:
                yield (sass_budget.product_case(kernel, size, output), size,
                       f"{size}x{size}x{size} {output}")


def measured(folder: Path) -> dict[str, dict[str, float]]:
    found = {}
    for name in ("conv.jsonl", "gemm.jsonl"):
        for text in (folder / name).read_text().splitlines():
            entry = json.loads(text)
            if "us" in entry:
                found[entry["key"]] = entry["us"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--best", action="store_true", help="of each call the fastest only")
    args = parser.parse_args()
    times = measured(args.measured) if args.measured else {}
    chosen = list(calls())
    distinct = list(dict.fromkeys(case for case, _, _ in chosen))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(distinct, pool.map(sass_budget.measure, distinct), strict=True))
    rows: dict[str, list[tuple[float, str, str]]] = {}
    for case, count, key in chosen:
        time, bound = predict(found[case], count)
        rows.setdefault(key, []).append((time, case.kernel.name, bound))
    print(f"{'call':35}{'kernel':22}{'predicted us':>13}" + f"{'measured':>10}" * bool(times)
          + "  bound by")
    near = total = 0
    for key, some in rows.items():
        for time, kernel, bound in [min(some)] if args.best else some:
            real = times.get(key, {}).get(kernel)
            text = f"{key:35}{kernel:22}{time:13.1f}"
            if real is not None:
                total, off = total + 1, time / real - 1
                near += abs(off) <= OFF
                text += f"{real:10.1f}  {off:+5.0%}{' !' if abs(off) > OFF else '  '}"
            print(f"{text}  {bound}")
    if total:
        print(f"{near} of {total} within {OFF:.0%}")


if __name__ == "__main__":
    main()
