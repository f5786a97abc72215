"""What holds large 1-bit products up: the clock under load, on zeros and on random bits.

    python benchmarks/gpu/clock.py FOLDER            about 15 s on a GPU

A product that waits for memory takes the same time whatever the bits are; one that the GPU slows
down for its power is faster on zeros, where nothing toggles. Each kernel and size runs in a
replayed CUDA graph for SECONDS, and nvidia-smi, where it is there, says meanwhile what the clock
and the power are and what lowers the clock. One line a run, in FOLDER/clock.jsonl too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_time import captured

from bitkernels.backends.cuda import kernels, launch

SECONDS, CALLS = 0.8, 8
SIZES = (8192, 16384)
KERNELS = ("bulk_128x256", "bulk_128x128")
QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active",
         "--format=csv,noheader,nounits", "-lms", "50")


def watch() -> subprocess.Popen | None:
    try:
        return subprocess.Popen(QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def read(text: str) -> dict:
    """The medians of what nvidia-smi wrote, without its first half: clocks take time to settle."""
    rows = [fields for line in text.splitlines() if len(fields := line.split(", ")) == 3]
    rows = rows[len(rows) // 2:]
    try:
        return {"MHz": statistics.median(float(row[0]) for row in rows),
                "W": statistics.median(float(row[1]) for row in rows),
                "lowered by": sorted({row[2] for row in rows})}
    except ValueError:  # no line, or a GPU that does not say
        return {}


def operands(bits: str, size: int) -> list[torch.Tensor]:
    if bits == "zeros":
        return [torch.zeros(size, size // 32, dtype=torch.int32, device="cuda") for _ in range(2)]
    return [torch.randint(-2**31, 2**31 - 1, (size, size // 32), dtype=torch.int32, device="cuda")
            for _ in range(2)]


def run(kernel: kernels.Kernel, size: int, bits: str) -> dict:
    words, filters = operands(bits, size)

    def call(number: int):
        return launch.packed_linear(kernel, words, filters, size, real=False, packed=True)

    graph = captured(call, CALLS)
    graph.replay()
    torch.cuda.synchronize()
    watching, count, start = watch(), 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        count += 4 * CALLS
    us = 1e6 * (time.perf_counter() - start) / count
    found = {}
    if watching is not None:
        watching.terminate()
        found = read(watching.communicate()[0])
    return {"kernel": kernel.name, "size": size, "bits": bits, "us": round(us, 2),
            "POPS": round(2 * size**3 / us / 1e9, 2), **found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "clock.jsonl").open("a") as file:
        for size in SIZES:
            for name in KERNELS:
                for bits in ("random", "zeros"):
                    line = json.dumps(run(kernels.ALL[name], size, bits))
                    print(line, flush=True)
                    file.write(line + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
