"""Products of packed matrices against cuBLAS, square sizes.

  python benchmarks/bench_gemm.py                 4096, 8192 and 16384 on a GPU
  python benchmarks/bench_gemm.py --sizes 8192    one of them
  python benchmarks/bench_gemm.py --device cpu    on a CPU, against its fp32 product

A row is one size and one provider: `triton` and `cuda` are the two GPU backends, `cpu` the one
there, each with packed, int32 or fp16 output; operands are packed already, as between the layers of
a network. The others are torch.mm. Times are with a cold L2 cache, as in bench_conv.py, and beside
them in a CUDA graph. POPS are 2 size^3 operations over the cold time. `of peak` is that over the
rate at which this GPU's 1-bit tensor core runs when nothing else does, measured in the same run.
`match` compares 128 rows of the int32 output with the exact product.

csrc/cuda runs where `python -m bitkernels` says that it can; rows that it does not take, and a
kernel that fails, are left out and named below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import common
import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from bitkernels import reference
from bitkernels.backends.cuda import dispatch, launch

ops = torch.ops.bitkernels
OUTPUTS = ("packed", "int32", "fp16")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """The GPU backend that packed_linear runs meanwhile."""
    before = os.environ.get("BITKERNELS_CUDA")
    os.environ["BITKERNELS_CUDA"] = "1" if name == "cuda" else "0"
    try:
        yield
    finally:
        os.environ.pop("BITKERNELS_CUDA")
        if before is not None:
            os.environ["BITKERNELS_CUDA"] = before


def product(name: str, output: str, a: Tensor, w: Tensor, size: int) -> Callable[[], Tensor]:
    dtype = {"int32": torch.int32, "fp16": torch.float16}.get(output)

    def call() -> Tensor:
        with backend(name):
            if output == "packed":
                return ops.packed_linear.packed(a, w, size)
            return ops.packed_linear(a, w, size, dtype=dtype)

    return call


def ours(device: common.Device, a: Tensor, w: Tensor, size: int, notes: dict[str, str]):
    names = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
    found: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        if name == "cuda":
            with backend(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = dispatch.explain("packed_linear", a, w, size, dtype=torch.int32)
            notes[f"cuda {size}"] = said
            if not said.startswith("cuda:"):
                continue
        found |= {f"{name} {out}": product(name, out, a, w, size) for out in OUTPUTS}
    return found


def rivals(device: common.Device, size: int, notes: dict[str, str]):
    found: dict[str, Callable[[], Tensor]] = {}
    for name, dtype in device.rivals.items():
        x, y = (torch.randn(size, size, device=device.type, dtype=dtype) for _ in range(2))
        found[name] = lambda x=x, y=y: torch.mm(x, y.T)
    if device.type == "cuda":
        x, y = (torch.randint(-1, 2, (size, size), device=device.type, dtype=torch.int8)
                for _ in range(2))
        try:
            torch._int_mm(x, y.T)
            found["int8"] = lambda: torch._int_mm(x, y.T)
        except RuntimeError as error:
            notes["int8"] = str(error).splitlines()[0]
    return found


def matches(call: Callable[[], Tensor], a: Tensor, w: Tensor, size: int) -> bool:
    want = reference.packed_linear(a[:128], w, size, dtype=torch.int32)[0]
    return torch.equal(call()[:128], want)


def peak_rate(device: common.Device, notes: dict[str, str]) -> float | None:
    """Operations a second of the bare tensor core; None where there is none."""
    if device.type == "cpu":
        return None
    try:
        call, products = launch.peak(torch.device("cuda", torch.cuda.current_device()))
        call()
        return 2 * products / float(np.median(device.measure(call, 0.2)))
    except Exception as error:
        notes["peak"] = f"{type(error).__name__}: {error}"
        return None


def run(device: common.Device, sizes: Sequence[int], seconds: float):
    """(rows, notes, peak in operations a second)."""
    notes: dict[str, str] = {}
    peak = peak_rate(device, notes)
    rows = []
    for size in tqdm(sizes, desc="sizes", disable=None):
        a, w = (torch.randint(-2**31, 2**31 - 1, (size, size // 32), dtype=torch.int32,
                              device=device.type) for _ in range(2))
        calls = ours(device, a, w, size, notes)
        checked = {name: matches(call, a, w, size) for name, call in calls.items()
                   if name.endswith("int32")}
        calls |= rivals(device, size, notes)
        with torch.no_grad():
            cold = common.measure_in_turns(device, calls, seconds)
            warm = common.measure_warm(device, calls, seconds, notes)
        for name, times in cold.items():
            rate = 2 * size**3 / times.p50
            binary = name.split()[0] in ("cpu", "triton", "cuda")
            rows.append({
                "size": size, "provider": name, "ms": 1e3 * times.p50, "ms p20": 1e3 * times.p20,
                "ms p80": 1e3 * times.p80,
                "graph ms": 1e3 * warm[name].p50 if name in warm else None, "POPS": rate / 1e15,
                "of peak": rate / peak if peak and binary else None,
                f"over {device.baseline}": cold[device.baseline].p50 / times.p50,
                "match": checked.get(name)})
        del a, w, calls
    return rows, notes, peak


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, help="multiples of 32")
    parser.add_argument("--min-run-time", type=float, default=0.3, metavar="SECONDS")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    chosen = parser.parse_args(arguments)
    device = common.pick_device(chosen.device)
    sizes = chosen.sizes or ((1024, 2048) if device.type == "cpu" else (4096, 8192, 16384))
    if any(size < 32 or size % 32 for size in sizes):
        parser.error("--sizes must be multiples of 32")
    rows, notes, peak = run(device, sizes, chosen.min_run_time)
    print(f"{device.name}, torch {torch.__version__}"
          + (f"; 1-bit tensor core alone: {peak / 1e15:.2f} POPS" if peak else ""))
    print(tabulate(rows, headers="keys", floatfmt=".3f", missingval="-"))
    for name, note in notes.items():
        print(f"{name}: {note}")
    if any(row["match"] is False for row in rows):
        print("WRONG RESULTS: see match")
    output = chosen.output or (None if chosen.sizes else common.RESULTS / common.slug(device.name))
    if output is not None:
        common.write_csv(output / "gemm.csv", rows)
        common.write_json(output / "gemm.json",
                          {**common.environment(device), "peak": peak, "notes": notes})
        print(f"written: {output / 'gemm.csv'}")
    return rows


if __name__ == "__main__":
    main()
