"""Times the passes of a training step on a GPU, tile by tile: what backends/triton/passes.py says.

    python benchmarks/gpu/tune_passes.py FOLDER               at most 60 s on a GPU
    python benchmarks/gpu/tune_passes.py FOLDER --only block_backward sign_backward
    python benchmarks/gpu/tune_passes.py FOLDER --write       and changes backends/triton/passes.py

Each pass runs at 64@56, 128@28, 256@14 and 512@7, batch 256, float16, channels last, a pooling from
twice the side, as ResNets' stem from 64@112 to 64@56, in a CUDA graph whose calls take operands in
turns, more of them than the L2 cache holds. Printed are bytes a second, counted as every activation
read or written once, against a copy of one activation, and for every pass the tile that is fastest
over all shapes. Results of a candidate that differ from those of the present tile are named.
FOLDER/passes.json is written after every pass, so what there was time for is there. Kernels are
compiled first, by several processes into Triton's cache. """

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_time

from bitkernels.backends.triton import dispatch, passes

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCH, HALF = 256, torch.float16
WINDOW = (3, 3), (2, 2), (1, 1), (1, 1), False
TURNS = 300 << 20  # bytes of operands taken in turns
# Bytes of an element that a pass moves; words and masks are 1/8. Of a pooling's output: four
# elements of its input, itself and a byte.
TRAFFIC = {
    "block_forward": 6, "norm_backward": 6, "block_backward": 8, "sign_backward": 8, "rprelu": 4,
    "rprelu_backward": 6, "rsign": 4, "mask_grad": 4.125, "unpack": 2.125, "sign_pack": 2.125,
    "moments": 2, "max_pool2d": 11, "max_pool2d_backward": 11,
}
TILES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8))  # elements, warps
WALKS = ((1024, 4), (1024, 8), (2048, 8))
PROGRAMS = (0, 264, 396, 528, 792)  # 0: two tiles each, which keeps too many sums for some
STEPS_STAGES = ((16, 1), (64, 1), (64, 2), (64, 3))
SUMS = ("block_backward", "sign_backward", "rprelu_backward", "moments")
STAGED = SUMS[:3]
WALK = ("block_forward", "norm_backward", *SUMS)


class Operands:
    """Of a shape: activations, dot products, words and vectors."""

    def __init__(self, channels: int, side: int, batch: int, device: str) -> None:
        shape, last = (batch, channels, side, side), torch.channels_last

        def real() -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=HALF).to(memory_format=last)

        self.x, self.grad, self.add = real(), real(), real()
        self.dot = torch.randint(-99, 99, shape, device=device, dtype=torch.int16).to(
            memory_format=last)
        self.words = torch.randint(-2**31, 2**31, (batch, side, side, channels // 32),
                                   device=device).int()
        self.c = [torch.rand(channels, device=device) - 0.5 for _ in range(3)]
        self.d = [(torch.rand(channels, device=device) - 0.5).double() for _ in range(4)]
        self.offsets = torch.randint(0, 9, shape, device=device, dtype=torch.uint8).to(
            memory_format=last)
        self.channels, self.side = channels, side

    @functools.cached_property
    def large(self) -> torch.Tensor:
        """What a pooling halves, four times as large: made when it is asked for."""
        size = 2 * self.side, 2 * self.side
        return torch.randn((*self.x.shape[:2], *size), device=self.x.device, dtype=HALF).to(
            memory_format=torch.channels_last)

    def call(self, name: str) -> Callable[[], object]:
        """A launch of a pass."""
        c, d, x = self.c, self.d, self.x
        if name == "max_pool2d":
            x = self.large
        op, args = {
            "block_forward": ("residual_block_forward", (self.dot, x, *d[:2], *c, False)),
            "norm_backward": ("residual_block_norm_backward",
                              (self.grad, self.dot, *d, False, HALF)),
            "block_backward": ("residual_block_backward",
                               (self.grad, self.dot, x, *d[:2], *c[:2], d[2], False)),
            "sign_backward": ("sign_backward",
                              (self.grad, x, c[0], self.add, "ste_sign", 1.0, 5.0)),
            "rprelu": ("rprelu", (x, *c)),
            "rprelu_backward": ("rprelu_backward", (self.grad, x, *c[:2])),
            "rsign": ("rsign", (x, c[0])),
            "mask_grad": ("mask_grad", (self.grad, self.words, 1)),
            "unpack": ("unpack", (self.words, self.channels, HALF, 1)),
            "sign_pack": ("sign_pack", (x, c[0], 1)),
            "moments": ("packed_conv2d_moments", (self.dot, False)),
            "max_pool2d": ("max_pool2d_with_offsets", (x, *WINDOW)),
            "max_pool2d_backward": ("max_pool2d_with_offsets_backward",
                                    (self.grad, self.offsets, (2 * self.side, 2 * self.side),
                                     *WINDOW)),
        }[name]
        if name == "moments":
            from bitkernels.backends.triton.packed_conv2d_moments import moments

            return lambda: moments(*args)
        kernel = dispatch.kernel(op)
        return lambda: kernel(*args)


def candidates(name: str) -> Iterator[passes.Pass]:
    """The present one first."""
    present = passes.PASSES[name]
    yield present
    walks = name in WALK
    found = ((present._replace(elements=e, warps=w) for e, w in TILES) if not walks else
             (present._replace(elements=e, warps=w, programs=p, steps=steps, stages=stages)
              for (e, w), p, (steps, stages) in itertools.product(
                  WALKS, PROGRAMS,
                  STEPS_STAGES if name in STAGED else [(present.steps, present.stages)])
              if p or name not in SUMS))
    yield from (tile for tile in found if tile != present)


def compile_some(share: tuple[list[str], int, int]) -> None:
    """Every kernel that is this process' share, into the cache on the disk."""
    names, number, processes = share
    jobs: list[tuple[str, passes.Pass, int]] = []
    for name in names:
        # programs are no constants
        tiles = {tile._replace(programs=0): tile for tile in candidates(name)}
        jobs += [(name, tile, c) for tile in tiles.values() for c, _ in SHAPES]
    for name, tile, channels in jobs[number::processes]:
        passes.PASSES[name] = tile
        try:
            Operands(channels, 2, 16, "cuda").call(name)()
            torch.cuda.synchronize()
        except Exception as error:  # the measurement will say so, too
            print(f"{name} {tile}: {error}", file=sys.stderr)


def seconds_of(name: str, sets: list[Operands]) -> float:
    calls = itertools.cycle([operands.call(name) for operands in sets])
    return statistics.median(
        gpu_time.graph(lambda: next(calls)(), len(sets) * 2, 5)) / 1e3


def copy_rate(elements: int) -> float:
    """Bytes a second of copies that are as large as an activation."""
    count = max(TURNS // (4 * elements), 2)
    pairs = itertools.cycle([(torch.zeros(elements, dtype=HALF, device="cuda"),
                              torch.empty(elements, dtype=HALF, device="cuda"))
                             for _ in range(count)])

    def copy() -> None:
        source, target = next(pairs)
        target.copy_(source)

    return 4 * elements / (statistics.median(gpu_time.graph(copy, 2 * count, 5)) / 1e3)


def first(outputs: object) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]  # type: ignore[index]


def measure(name: str, sets: list[Operands], spent: Callable[[], bool]) -> list[dict]:
    """Rows of the candidates of a pass on one shape."""
    elements, rows, expected = sets[0].x.numel(), [], None
    for tile in candidates(name):
        if spent():
            break
        passes.PASSES[name], present = tile, passes.PASSES[name]
        try:
            seconds = seconds_of(name, sets)
            got = first(sets[0].call(name)())
            expected = got if expected is None else expected
            rows.append({**tile._asdict(), "us": seconds * 1e6,
                         "GB/s": TRAFFIC[name] * elements / seconds / 1e9,
                         "equal": torch.equal(got, expected)})
        except Exception as error:  # a tile that a GPU has no room for costs only itself
            rows.append({**tile._asdict(), "error": f"{type(error).__name__}: {error}"[:200]})
        finally:
            passes.PASSES[name] = present
    return rows


def best(found: dict[str, list[dict]]) -> tuple[dict, float] | None:
    """The candidate with the least time relative to the present one, over the shapes that have all;
    and that time."""
    ratios: dict[tuple, list[float]] = {}
    for rows in found.values():
        for row in rows:
            if row.get("equal") and "us" in rows[0]:
                key = tuple(row[field] for field in passes.Pass._fields)
                ratios.setdefault(key, []).append(row["us"] / rows[0]["us"])
    whole = {key: statistics.fmean(r) for key, r in ratios.items() if len(r) == len(found)}
    if not whole:
        return None
    key = min(whole, key=lambda k: whole[k])
    return dict(zip(passes.Pass._fields, key, strict=True)), whole[key]


def write(chosen: dict[str, dict], source: str) -> str:
    """passes.py with the tiles that take at most 0.98 of the present time."""
    for name, found in chosen.items():
        if found["time of the present"] <= 0.98:
            fields = ", ".join(f"{field}={found[field]}" for field in passes.Pass._fields)
            source, changes = re.subn(
                rf'"{name}": Pass\(.*\),', f'"{name}": Pass({fields}),', source)
            assert changes == 1, name
    return source


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where passes.json goes")
    parser.add_argument("--only", nargs="+", choices=TRAFFIC, default=list(TRAFFIC))
    parser.add_argument("--write", action="store_true", help="what is faster into passes.py")
    parser.add_argument("--seconds", type=float, default=55, help="stop after so many")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 10))
    options = parser.parse_args(argv)
    start = time.monotonic()

    def spent() -> bool:
        return time.monotonic() - start > options.seconds

    options.folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        work = pool.map_async(compile_some, [(options.only, i, options.processes)
                                             for i in range(options.processes)], 1)
        work.wait(0.6 * options.seconds)  # what is not ready is compiled below
        compiled = work.ready() and work.successful()
    record: dict = {"device": torch.cuda.get_device_name(), "batch": BATCH, "dtype": "float16",
                    "compiled first": compiled, "compile s": time.monotonic() - start,
                    "copy GB/s": {}, "passes": {name: {} for name in options.only}, "best": {}}
    # Shapes outside, for their operands; the largest last, in case time runs out.
    for channels, side in reversed(SHAPES):
        if spent():
            break
        shape = f"{channels}@{side}"
        elements = BATCH * channels * side * side
        rate = record["copy GB/s"][shape] = copy_rate(elements) / 1e9
        print(f"== {shape}: a copy moves {rate:.0f} GB/s", flush=True)
        sets = [Operands(channels, side, BATCH, "cuda")
                for _ in range(max(TURNS // (6 * elements), 2))]
        for name in options.only:
            rows = record["passes"][name][shape] = measure(name, sets, spent)
            timed = [row for row in rows if "us" in row]
            for row in sorted(timed, key=lambda row: row["us"])[:1] + timed[:1]:
                tile = " ".join(f"{row[field]:5d}" for field in passes.Pass._fields)
                print(f"{name:16s} {tile} {row['us']:8.2f} us {row['GB/s']:6.0f} GB/s "
                      f"{row['GB/s'] / rate:5.2f} of a copy"
                      f"{'' if row['equal'] else '  DIFFERS'}"
                      f"{'  (present)' if row is timed[0] else ''}", flush=True)
            for row in rows:
                if "error" in row or not row.get("equal", True):
                    print(f"{name:16s} {row}", flush=True)
            (options.folder / "passes.json").write_text(json.dumps(record, indent=1))
        del sets
    for name, found in record["passes"].items():
        chosen = best({shape: rows for shape, rows in found.items() if rows})
        if chosen is not None:
            record["best"][name] = {**chosen[0], "time of the present": chosen[1]}
            print(f"best {name:16s} {passes.Pass(**chosen[0])} {chosen[1]:.3f} of the present time")
    (options.folder / "passes.json").write_text(json.dumps(record, indent=1))
    if options.write:
        path = Path(passes.__file__)
        path.write_text(write(record["best"], path.read_text()))
    print(f"{time.monotonic() - start:.0f} s, of which compiling {record['compile s']:.0f} s")


if __name__ == "__main__":
    main()
