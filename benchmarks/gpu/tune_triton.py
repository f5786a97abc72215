"""Times tiles of Triton's 1-bit convolution on a GPU: `configs.MEASURED` is filled from it by hand.

    python benchmarks/gpu/tune_triton.py OUT_FOLDER              at most 75 s with a cold cache
    python benchmarks/gpu/tune_triton.py OUT_FOLDER --seconds 40

Four 3x3 layers at batch 256 and 64, each with four outputs: `real` (fp16), `block` (fp16 residual,
norm, RPReLU; fp16 and signs out), `packed` (signs by thresholds), `int16` (dot products). All tiles
are compiled first, side by side on all cores. A time is the median of a call in a CUDA graph, with
the small kernel that prepares corrections. Each tile's output is compared with that of the tile
that runs unasked, and that one's first image with the reference. cuDNN is the fp16 convolution of
the same sizes, channels-last, in the same run.

Writes tune_triton.json, prints a table and lines for `configs.MEASURED`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import gpu_time  # noqa: E402

from bitkernels import reference  # noqa: E402
from bitkernels.backends.triton import configs, dispatch, tuning  # noqa: E402

DEVICE = "cuda"
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels in and out, size
BATCHES = (256, 64)
OUTPUTS = ("real", "block", "packed", "int16")
# The shipped ones, and others that would have to be added to `configs.B1`.
TILES = {
    "4 warps": configs.b1(4, 4),
    "2 warps": configs.b1(4, 2),
    "1 warp": configs.b1(4, 1),
    "8 warps": configs.b1(4, 8),
    "4 warps, 168 registers": configs.b1(4, 4, registers=168),
    "4 warps, 168 registers, lines": configs.b1(4, 4, lines=1, registers=168),
}
BETTER = 0.97  # of the time of the tile that runs unasked: below, a line is worth its place
COMPILING = 40.0  # seconds at most

Call = Callable[[], tuple]


def call(channels: int, size: int, batch: int, output: str) -> tuple[Call, Call]:
    """(a call of the kernel, the reference of its first image)."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int32, device=DEVICE,
                             generator=generator)

    def vector() -> torch.Tensor:
        return torch.rand(channels, device=DEVICE, generator=generator) + 0.5

    x, filters = words(batch, size, size, channels // 32), words(channels, 3, 3, channels // 32)
    rest: dict = dict(real=output != "packed", packed=output in ("packed", "block"),
                      dtype=torch.int16 if output == "int16" else torch.float16)
    residual = None
    if output == "packed":
        low = torch.randint(-40, 40, (channels,), dtype=torch.int32, device=DEVICE,
                            generator=generator)
        rest["threshold"] = torch.stack([low, torch.full_like(low, 2**31 - 1)])
    elif output == "block":
        residual = torch.randn(batch, channels, size, size, device=DEVICE, generator=generator
                               ).half().to(memory_format=torch.channels_last)
        rest |= {name: vector() for name in ("bias", "shift_in", "slope", "shift_out",
                                             "sign_shift")}
        rest["scale"] = vector() / 64
    args = filters, channels, (1, 1), (1, 1)
    kernel = dispatch.kernel("packed_conv2d")
    parts = {} if residual is None else {"residual": residual}
    first = {} if residual is None else {"residual": residual[:1]}
    return (lambda: kernel(x, *args, **rest, **parts, inner="b1"),
            lambda: reference.packed_conv2d(x[:1], *args, **rest, **first))


def cudnn(channels: int, size: int, batch: int) -> Call:
    x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=torch.float16)
    w = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=torch.float16)
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    return lambda: (torch.nn.functional.conv2d(x, w, padding=1),)


def microseconds(run: Call) -> float:
    return round(1e3 * statistics.median(gpu_time.graph(run)), 2)


def same(have: tuple, want: tuple) -> bool:
    return all(w is None or torch.equal(h[:len(w)], w)
               for h, w in zip(have, want, strict=True))


def compile_shard(shard: int, shards: int) -> None:
    """Runs its part of all kernels once; batches of a layer share theirs."""
    jobs = [(*layer, output, tile) for layer in LAYERS for output in OUTPUTS
            for tile in TILES.values()]
    for channels, size, output, tile in jobs[shard::shards]:
        with tuning.fixed(tile):
            call(channels, size, min(BATCHES), output)[0]()
    torch.cuda.synchronize()


def compile_all(seconds: float) -> list[str]:
    """What went wrong."""
    shards = max(1, min(os.cpu_count() or 1, 16))
    command = [sys.executable, __file__, "-", "--shard"]
    running = [subprocess.Popen([*command, str(i), str(shards)], stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True) for i in range(shards)]
    end, wrong = time.monotonic() + seconds, []
    for process in running:
        try:
            _, said = process.communicate(timeout=max(0.1, end - time.monotonic()))
            if process.returncode:
                wrong.append((said.strip().splitlines() or ["no word"])[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            wrong.append(f"a process was still compiling after {seconds:.0f} s")
    return wrong


def measure(channels: int, size: int, batch: int, output: str) -> dict:
    """One row: microseconds by tile, what differs, which tile runs unasked."""
    family = configs.family(torch.device(DEVICE))
    contraction = configs.Size(batch * size * size, channels, 9, channels // 32,
                               "real" if output == "int16" else output)
    unasked = configs.fixed_tile("b1", family, contraction)
    run, first = call(channels, size, batch, output)
    with tuning.fixed(unasked):
        expected = run()
    row = {"layer": f"{channels}@{size}", "channels": channels, "batch": batch, "output": output,
           "unasked": next((name for name, tile in TILES.items() if tile == unasked), str(unasked)),
           "exact": same(expected, first()), "us": {}, "wrong": {}}
    for name, tile in TILES.items():
        try:
            with tuning.fixed(tile):
                if not same(run(), expected):
                    row["wrong"][name] = "differs"
                    continue
                row["us"][name] = microseconds(run)
        except Exception as error:  # one that does not run must not cost the others
            row["wrong"][name] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def rows(end: float) -> Iterator[dict]:
    for batch in BATCHES:
        for channels, size in LAYERS:
            if time.monotonic() > end:
                return
            peer = microseconds(cudnn(channels, size, batch))
            for output in OUTPUTS:
                if time.monotonic() > end:
                    return
                yield measure(channels, size, batch, output) | {"cudnn": peer}


def table(found: list[dict]) -> Iterator[str]:
    names = [name.replace(" warps", "w").replace(" registers", "r") for name in TILES]
    yield "  ".join(f"{name:>13}" for name in ("layer, batch", "output", "exact", "cuDNN fp16",
                                               "unasked", *names))
    for row in found:
        us = [row["us"].get(name, "wrong") for name in TILES]
        cells = (f"{row['layer']} {row['batch']}", row["output"], row["exact"], row["cudnn"],
                 row["unasked"], *us)
        yield "  ".join(f"{cell!s:>13}" for cell in cells)
    for row in found:
        for name, what in row["wrong"].items():
            yield f"{row['layer']} {row['batch']} {row['output']}, {name}: {what}"


def lines(found: list[dict], family: str) -> Iterator[str]:
    """Entries of configs.MEASURED where another tile is clearly better at the largest batch."""
    for row in found:
        us, unasked = row["us"], row["unasked"]
        if row["batch"] != max(BATCHES) or row["output"] == "int16" or unasked not in us:
            continue
        best = min(us, key=us.get)
        if us[best] < BETTER * us[unasked]:
            yield (f"    ({family!r}, {row['channels']}, 9, {row['channels'] // 32}, "
                   f"{row['output']!r}): ...,  # {best}: {us[best]} us, {unasked}: {us[unasked]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=75.0, help="for everything (75)")
    parser.add_argument("--shard", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.shard is not None:
        compile_shard(*args.shard)
        return 0
    end = time.monotonic() + args.seconds
    family = configs.family(torch.device(DEVICE))
    if not configs.has_b1(family):
        print(f"{family} has no 1-bit tensor core")
        return 2
    start = time.monotonic()
    wrong = compile_all(min(COMPILING, 0.6 * args.seconds))
    compiled = time.monotonic() - start
    args.folder.mkdir(parents=True, exist_ok=True)
    found: list[dict] = []
    for row in rows(end - 2):
        found.append(row)
        (args.folder / "tune_triton.json").write_text(json.dumps(
            {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
             "compile_seconds": round(compiled, 1), "compile_errors": wrong, "rows": found},
            indent=1))
    print(*table(found), sep="\n")
    total = len(BATCHES) * len(LAYERS) * len(OUTPUTS)
    print(f"{torch.cuda.get_device_name()}, us in a CUDA graph; compiled in {compiled:.0f} s; "
          f"{len(found)} of {total} rows")
    print("for configs.MEASURED:", *lines(found, family), sep="\n")
    print(*dict.fromkeys(wrong), sep="\n")
    return int(not found or any(r["wrong"] or not r["exact"] for r in found))


if __name__ == "__main__":
    raise SystemExit(main())
