"""Products of packed matrices against cuBLAS, square sizes.

  python benchmarks/bench_gemm.py                 4096, 8192 and 16384 on a GPU
  python benchmarks/bench_gemm.py --sizes 8192    one of them
  python benchmarks/bench_gemm.py --device cpu    on a CPU, against its fp32 product

A row is one size and one provider: `triton` and `cuda` are the GPU backends, `bitkernels` is the
CPU's, each with packed, int32 or fp16 output; operands are packed already, as between the layers of
a network. The others are torch.mm. Times are with a cold L2 cache, as in bench_conv.py, and beside
them in a CUDA graph. POPS are 2 size^3 operations over the cold time. `of peak` is that over the
rate at which this GPU's 1-bit tensor core runs when nothing else does (on a CPU, the rate of
counting bits). `of floor` is the floor over the cold time: the bytes of operands and output
divided by the bandwidth of a copy. Both rates are measured in the same run. `match` compares 128
rows with the exact product.

csrc/cuda runs where `python -m bitkernels` says that it can; rows that it does not take, and a
kernel that fails, are left out and named below the table. `kernel` is the one that ran.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import common
import torch
from gpu_backends import Ours, by_backend, peak_rate
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from bitkernels import reference

ops = torch.ops.bitkernels
OUTPUTS = {"packed": None, "int32": torch.int32, "fp16": torch.float16}
BITS = {"packed": 1, "int32": 32, "fp16": 16}


def product(output: str, a: Tensor, w: Tensor, size: int) -> Tensor:
    if output == "packed":
        return ops.packed_linear.packed(a, w, size)
    return ops.packed_linear.default(a, w, size, dtype=OUTPUTS[output])


def ours(device: common.Device, a: Tensor, w: Tensor, size: int, notes: dict[str, str]):
    outputs = {}
    for name, dtype in OUTPUTS.items():
        kw = {"real": dtype is not None, "packed": dtype is None, "dtype": dtype}
        outputs[name] = Ours(partial(product, name, a, w, size), [((a, w, size), kw)])
    return by_backend(device, "packed_linear", outputs, f"{size}", notes)


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


def right(output: str, found: Tensor, exact: Tensor, signs: Tensor) -> bool:
    """Whether the first rows are those of the exact product and of its signs."""
    if output == "packed":
        return torch.equal(found[: len(exact)], signs)
    return torch.equal(found[: len(exact)], exact.to(OUTPUTS[output]))


def match(calls: Mapping[str, Callable[[], Tensor]], a: Tensor, w: Tensor, size: int
          ) -> dict[str, bool]:
    exact = reference.packed_linear(a[:128], w, size, dtype=torch.int32, packed=True)
    return {name: right(name.split()[1], call(), *exact) for name, call in calls.items()}


def traffic(device: common.Device, provider: str, size: int) -> int:
    """Bytes of both operands and the output."""
    _, _, output = provider.partition(" ")
    if output:
        operand, result = 1, BITS[output]
    elif provider == "int8":
        operand, result = 8, 32
    else:
        operand = result = 8 * device.rivals[provider].itemsize
    return size * size * (2 * operand + result) // 8


def run(device: common.Device, sizes: Sequence[int], seconds: float):
    """(rows, notes, peak in operations a second)."""
    notes: dict[str, str] = {}
    peak, bandwidth = peak_rate(device, notes), device.copy_bandwidth()
    rows = []
    for size in tqdm(sizes, desc="sizes", disable=None):
        a, w = (torch.randint(-2**31, 2**31 - 1, (size, size // 32), dtype=torch.int32,
                              device=device.type) for _ in range(2))
        calls, kernels = ours(device, a, w, size, notes)
        checked = match(calls, a, w, size)
        calls |= rivals(device, size, notes)
        with torch.no_grad():
            cold = common.measure_in_turns(device, calls, seconds)
            warm = common.measure_warm(device, calls, seconds, notes)
        for name, times in cold.items():
            rate = 2 * size**3 / times.p50
            floor = traffic(device, name, size) / bandwidth if bandwidth else None
            rows.append({
                "size": size, "provider": name, "ms": 1e3 * times.p50,
                "ms p20": 1e3 * times.p20, "ms p80": 1e3 * times.p80,
                "graph ms": 1e3 * warm[name].p50 if name in warm else None, "POPS": rate / 1e15,
                "of peak": rate / peak if peak and name in checked else None,
                "of floor": floor / times.p50 if floor else None,
                f"over {device.baseline}": cold[device.baseline].p50 / times.p50,
                "match": checked.get(name), "kernel": kernels.get(name)})
        del a, w, calls
    return rows, notes, peak


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, help="multiples of 32")
    parser.add_argument("--min-run-time", type=float, default=0.3, metavar="SECONDS")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--backends", nargs="+", choices=common.GpuDevice.backends,
                        help="on a GPU these only")
    chosen = parser.parse_args(arguments)
    device = common.pick_device(chosen.device)
    if chosen.backends and device.backends != common.CpuDevice.backends:
        device.backends = tuple(chosen.backends)
    sizes = chosen.sizes or ((1024, 2048) if device.type == "cpu" else (4096, 8192, 16384))
    if any(size < 32 or size % 32 for size in sizes):
        parser.error("--sizes must be multiples of 32")
    rows, notes, peak = run(device, sizes, chosen.min_run_time)
    print(f"{device.name}, torch {torch.__version__}"
          + (f"; 1-bit arithmetic alone: {peak / 1e15:.3g} POPS" if peak else ""))
    print(tabulate(rows, headers="keys", floatfmt=".3f", missingval="-"))
    for name, note in notes.items():
        print(f"{name}: {note}")
    complete = not (chosen.sizes or chosen.backends)
    output = chosen.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        common.write_csv(output / "gemm.csv", rows)
        common.write_json(output / "gemm.json",
                          {**common.environment(device), "peak": peak, "notes": notes})
        print(f"written: {output / 'gemm.csv'}")
    if any(row["match"] is False for row in rows):
        raise SystemExit("wrong results: see match")
    return rows


if __name__ == "__main__":
    main()
