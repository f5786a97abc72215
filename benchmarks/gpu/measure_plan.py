"""Times the kernels of csrc/cuda and Triton's on a GPU, call by call: what the plan chooses from.

    python benchmarks/gpu/measure_plan.py                            every call, every kernel
    python benchmarks/gpu/measure_plan.py --kernels mma_128x128 ...  these kernels only
    python benchmarks/gpu/measure_plan.py --output elsewhere.json    default: the package's own

Calls are the layers of ResNet-18 and a few matrices, at batches 1, 16 and 256, with packed and with
fp16 outputs. Each kernel's output is compared bit for bit with Triton's, and Triton's first image
with the reference; a kernel that differs is left out and named. Times are medians with a cold L2
cache, the kernels in turns. The table is written after every call, and what it says of other
architectures stays. Run `gpu_check_cuda.py` first: it finds kernels that hang, in processes of
their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from bitkernels import reference
from bitkernels.backends.cuda import dispatch, kernels, launch, plan
from bitkernels.backends.triton import dispatch as triton

ROUNDS, REPEATS = 3, 15
# Output and input channels, size of the output, kernel, stride.
LAYERS = ((64, 64, 56, 3, 1), (128, 64, 28, 3, 2), (128, 128, 28, 3, 1), (256, 128, 14, 3, 2),
          (256, 256, 14, 3, 1), (512, 256, 7, 3, 2), (512, 512, 7, 3, 1), (512, 512, 14, 1, 1),
          (1024, 512, 7, 1, 1))
BATCHES = (1, 16, 256)  # the plan looks four times as far as these
MATRICES = ((64, 1024, 1024), (1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192),
            (16384, 16384, 16384))  # rows, columns, channels


@dataclass(frozen=True)
class Call:
    op: str
    args: tuple
    kw: dict
    name: str


def words(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int32, device=device)


def calls(device: torch.device, layers=LAYERS, batches=BATCHES, matrices=MATRICES
          ) -> Iterator[Call]:
    outputs = {"packed": dict(real=False, packed=True),
               "fp16": dict(real=True, packed=False, dtype=torch.float16)}
    for cout, cin, size, kernel, stride in layers:
        for batch in batches:
            args = (words(device, batch, size * stride, size * stride, cin // 32),
                    words(device, cout, kernel, kernel, cin // 32), cin, (stride, stride),
                    (kernel // 2,) * 2)
            for out, kw in outputs.items():
                yield Call("packed_conv2d", args, kw,
                           f"{kernel}x{kernel}/{stride}:{cin}-{cout}@{size} batch {batch} {out}")
    for rows, columns, channels in matrices:
        args = (words(device, rows, channels // 32), words(device, columns, channels // 32),
                channels)
        for out, kw in outputs.items():
            yield Call("packed_linear", args, kw, f"{rows}x{columns}x{channels} {out}")


def same(a: Sequence, b: Sequence) -> bool:
    return all(x is None and y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def first_image(call: Call) -> bool:
    """Whether Triton's first rows are the reference's."""
    args = (call.args[0][:1], *call.args[1:])
    expected = getattr(reference, call.op)(*args, **call.kw)
    return same(triton.run(call.op, *args, **call.kw), expected)


def measure(call: Call, names: Sequence[str], device: torch.device,
            cold: Callable[[Callable, int], list[float]]) -> tuple[dict, list[str]]:
    """(entry of the table, what is wrong with kernels)."""
    wrong = [] if first_image(call) else ["triton differs from the reference"]
    expected = triton.run(call.op, *call.args, **call.kw)
    runs: dict[str, Callable] = {plan.NEXT: lambda: triton.run(call.op, *call.args, **call.kw)}
    families = kernels.FAMILIES[launch.architecture(device)]
    for kernel in launch.taking(families, call.op, call.args, call.kw):
        if kernel.name not in names:
            continue

        def run(kernel=kernel):
            return getattr(launch, call.op)(kernel, *call.args, **call.kw)

        try:
            right = same(expected, run())
        except Exception as error:
            wrong.append(f"{kernel.name}: {type(error).__name__}: {error}")
            continue
        if right:
            runs[kernel.name] = run
        else:
            wrong.append(f"{kernel.name} differs from triton")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            samples[name] += cold(run, REPEATS)
    problem = launch.problem(call.op, call.args, call.kw)
    rows, cout, products = problem.sizes
    return {"op": call.op, "rows": rows, "cout": cout, "products": products, "real": problem.real,
            "us": {name: round(1e3 * statistics.median(t), 2) for name, t in samples.items()}
            }, wrong


def write(path: Path, arch: str, gpu: str, entries: list[dict]) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    found[arch] = {"gpu": gpu, "date": datetime.date.today().isoformat(),
                   "torch": torch.__version__, "calls": entries}
    path.write_text(json.dumps(found, indent=1) + "\n")


def run(device: torch.device, gpu: str, chosen: Sequence[Call], names: Sequence[str], path: Path,
        cold: Callable[[Callable, int], list[float]]) -> int:
    """Number of kernels that were wrong somewhere."""
    arch = launch.architecture(device)
    assert arch is not None
    entries, lines, failures = [], [], {}
    for call in tqdm(chosen, desc="calls", disable=None):
        entry, wrong = measure(call, names, device, cold)
        entries.append(entry)
        failures |= {text: call.name for text in wrong}
        write(path, arch, gpu, entries)
        us = entry["us"]
        best = min(us, key=us.get)
        lines.append([call.name, best, us[best], us[plan.NEXT], f"{us[plan.NEXT] / us[best]:.2f}x"])
    print(tabulate(lines, ["call", "fastest", "us", "triton us", "over triton"]))
    for text, where in failures.items():
        print(f"WRONG in {where}: {text}")
    print(f"written: {path}")
    return len(failures)


def main(arguments: Sequence[str] | None = None) -> int:
    everything = [name for name in kernels.ALL if name != kernels.PREPARE.name]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=everything, default=everything)
    parser.add_argument("--output", type=Path, default=plan.MEASURED)
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    reason = dispatch.why_unusable(device)
    if reason is not None:
        print(f"nothing to measure: {reason}")
        return 1
    import gpu_time

    with torch.no_grad():
        return int(run(device, torch.cuda.get_device_name(), list(calls(device)), chosen.kernels,
                       chosen.output, gpu_time.cold) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
