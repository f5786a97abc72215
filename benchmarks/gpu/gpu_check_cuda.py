"""One command on an NVIDIA GPU: do the kernels of csrc/cuda work there, and how fast are they.

    python benchmarks/gpu/gpu_check_cuda.py                 all steps
    python benchmarks/gpu/gpu_check_cuda.py --quick         no sanitizer, no largest sizes
    python benchmarks/gpu/gpu_check_cuda.py --only check    the steps whose names start so
    python benchmarks/gpu/gpu_check_cuda.py --list          what there is, and the limits in seconds

These kernels have not run on every architecture, and a pipeline that has not run could hang. So
every step, and in the first one every kernel, has a process and a time limit of its own; what fails
or hangs is recorded and the rest goes on. Tests and sanitizers, which measure nothing, run side by
side and share a limit. Ends with the goals (gpu_goals.py) that this run meets. Writes
benchmarks/results/<gpu>/gpu_check_cuda.json, and the measurements into cuda/ beside it.

Where every step passes, measure_plan.py can measure what runs unasked.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import gpu_goals

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
CHECK = """
import sys, torch
from bitkernels.backends.cuda import dispatch, kernels, selfcheck
device = torch.device("cuda", torch.cuda.current_device())
reason = dispatch.why_unusable(device)
if reason: sys.exit("unusable: " + reason)
kernel = kernels.ALL[sys.argv[1]]
for op in (("packed_linear",) if kernel.bulk else dispatch.OPS):
    failure = selfcheck.failure(op, kernel, device)
    torch.cuda.synchronize()
    if failure: sys.exit(f"{op} {failure}")
print("exact")
"""
# Test files, and over how many processes each is spread
TESTS = {"ops/test_packed_linear": 2, "ops/test_packed_conv2d": 4, "ops/test_binary_conv2d": 3,
         "test_interop": 1, "nn/test_packed": 2}
LAYERS = ("3x3:64@56", "3x3:128@28", "3x3:256@14", "3x3:512@7")
MEASURING = ("gemm", "conv", "block", "trunk")  # each writes a csv file of its name


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    limit: int  # seconds
    environment: Mapping[str, str] = field(default_factory=dict)
    group: str = ""  # steps of one group run side by side and share the limit
    needs: str = ""  # a step that must not have failed


def step(command: Sequence[str], limit: int, **environment: str) -> dict:
    """What a process printed last; {"failed": why} where it failed or took too long."""
    start = time.time()
    child = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True,
                             env={**os.environ, "BITKERNELS_CUDA": "1",
                                  "PYTHONPATH": str(ROOT), **environment})
    try:
        output, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the step and what it started
        output = ""
        with contextlib.suppress(subprocess.TimeoutExpired):  # left, where the GPU holds it
            output, _ = child.communicate(timeout=10)
        return {"failed": f"no end after {limit} s", "output": output[-3000:]}
    result = {"seconds": round(time.time() - start, 1), "output": output[-3000:]}
    if child.returncode:
        result["failed"] = f"exit {child.returncode}"
    return result


def last_line(result: dict) -> str:
    lines = result["output"].strip().splitlines()
    return lines[-1][:110] if lines else ""


def steps(families: tuple[str, ...], quick: bool) -> Iterator[Step]:
    """In the order of need."""
    from bitkernels.backends.cuda import kernels

    python = sys.executable
    found = [k for k in kernels.ALL.values() if k.family in families]
    for kernel in found:
        yield Step(f"check {kernel.name}", [python, "-c", CHECK, kernel.name], 35)
    for test, shards in TESTS.items():
        for shard in range(shards):
            yield Step(f"tests {test} {shard + 1}/{shards}",
                       [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                        f"bitkernels_tests/{test}.py"],
                       160, {"BITKERNELS_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "2",
                             "BITKERNELS_TEST_SHARD": f"{shard}/{shards}"}, group="tests")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not quick:
        for tool in ("memcheck", "racecheck"):
            for name in {f: k.name for f, k in ((k.family, k) for k in reversed(found))}.values():
                yield Step(f"{tool} {name}", [sanitizer, "--tool", tool, "--error-exitcode", "1",
                                              python, "-c", CHECK, name], 90, group=tool,
                           needs=f"check {name}")

    def measure(name: str, limit: int, *options: str) -> Step:
        return Step(name, [python, f"benchmarks/bench_{name}.py", *options, "--min-run-time", "0.1",
                           "--output", str(results() / "cuda")], limit)

    sizes = ["4096", "8192"] if quick else ["4096", "8192", "16384"]
    yield measure("gemm", 100, "--sizes", *sizes)
    yield measure("conv", 200, "--batch", "64", "256", "--layers", *LAYERS)
    yield measure("trunk", 70)
    yield measure("block", 120, "--blocks", "256@14", "--batch", "256", "--mode", "inference")
    for kernel in found:
        if not kernel.resident:
            yield Step(f"gemm {kernel.name}",
                       [python, "benchmarks/bench_gemm.py", "--sizes", "8192", "--backends", "cuda",
                        "--min-run-time", "0.1"], 25,
                       {"BITKERNELS_CUDA_KERNEL": kernel.name}, needs=f"check {kernel.name}")


def together(group: Sequence[Step], failed: Sequence[str]) -> list[dict]:
    """Results of steps that share a limit, side by side as far as there are processors."""
    end = time.time() + group[0].limit

    def run(one: Step) -> dict:
        if one.needs in failed:
            return {"failed": f"not run, since {one.needs} failed", "output": ""}
        limit = one.limit if len(group) == 1 else max(1, int(end - time.time()))
        return step(one.command, limit, **one.environment)

    with ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(run, group))


def measured(done: Mapping[str, Mapping]) -> dict[str, list[dict[str, str]]]:
    """The csv files of the measuring steps that passed in this run, by step."""
    found = {}
    for name in MEASURING:
        path = results() / "cuda" / f"{name}.csv"
        if "failed" not in done.get(name, {"failed": "not run"}) and path.exists():
            with path.open(newline="") as file:
                found[name] = list(csv.DictReader(file))
    return found


def results() -> Path:
    import common
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-gpu"
    return common.RESULTS / common.slug(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="STEP", default=[""])
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    import torch

    from bitkernels.backends.cuda import kernels

    if chosen.list:
        limits: dict[str, int] = {}
        for one in steps(kernels.FAMILIES["sm_90a"], chosen.quick):
            print(f"{one.name:28}{one.limit:5}{one.group and '  side by side'}")
            limits[one.group or one.name] = one.limit
        print(f"{'together at most':28}{sum(limits.values()):5}")
        return 0
    if not torch.cuda.is_available():
        print("no GPU: nothing to check")
        return 1
    arch = kernels.architecture(torch.cuda.get_device_capability())
    if arch is None:
        print(f"{torch.cuda.get_device_name()} has no 1-bit tensor core: nothing to check")
        return 1
    report = {"gpu": torch.cuda.get_device_name(), "architecture": arch,
              "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"), "steps": {}}
    path = results() / "gpu_check_cuda.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    asked: list[gpu_goals.Goal] = []
    chosen_steps = [one for one in steps(kernels.FAMILIES[arch], chosen.quick)
                    if one.name.startswith(tuple(chosen.only))]
    for _, group in itertools.groupby(chosen_steps, key=lambda one: one.group or one.name):
        members = list(group)
        for one, result in zip(members, together(members, failed), strict=True):
            report["steps"][one.name] = result
            if "failed" in result:
                failed.append(one.name)
            print(f"{'FAILED' if 'failed' in result else 'ok':7}{one.name:28}"
                  f"{result.get('failed', '')} {last_line(result)}", flush=True)
        asked = list(gpu_goals.cuda_goals(report["steps"], measured(report["steps"])))
        report["goals"] = [goal.record() for goal in asked]
        path.write_text(json.dumps(report, indent=1))
    print("\n== goals (for an H200)")
    for goal in asked:
        print(" ", goal.line())
    print(f"\nwritten: {path}" + (f"\nFAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
