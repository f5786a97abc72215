"""One command on an NVIDIA GPU: do the kernels of csrc/cuda work there, and how fast are they.

    python benchmarks/gpu_check_cuda.py                 all steps
    python benchmarks/gpu_check_cuda.py --quick         without the sanitizer and the largest sizes
    python benchmarks/gpu_check_cuda.py --only check    the steps whose names start so
    python benchmarks/gpu_check_cuda.py --list          what there is, and the limits in seconds

These kernels have not run on every architecture, and a pipeline that has not run could hang. So
every step, and in the first one every kernel, has a process and a time limit of its own; what fails
or hangs is recorded and the rest goes on. Writes benchmarks/results/<gpu>/gpu_check_cuda.json.

A family of which every step passes can be added to PROVEN in bitkernels/backends/cuda/kernels.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
TESTS = ("test_packed_linear.py", "test_packed_conv2d.py", "test_binary_conv2d.py",
         "test_interop.py", "test_nn_packed.py")


def step(command: list[str], limit: int, **environment: str) -> dict:
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
        output, _ = child.communicate()
        return {"failed": f"no end after {limit} s", "output": output[-3000:]}
    result = {"seconds": round(time.time() - start, 1), "output": output[-3000:]}
    if child.returncode:
        result["failed"] = f"exit {child.returncode}"
    return result


def last_line(result: dict) -> str:
    lines = result["output"].strip().splitlines()
    return lines[-1][:110] if lines else ""


def steps(families: tuple[str, ...], quick: bool):
    """(name, command, limit in seconds, environment) in the order of need."""
    from bitkernels.backends.cuda import kernels

    python = sys.executable
    found = [k for k in kernels.ALL.values() if k.family in families]
    for kernel in found:
        yield f"check {kernel.name}", [python, "-c", CHECK, kernel.name], 60, {}
    for test in TESTS:
        yield (f"tests {test[5:-3]}",
               [python, "-m", "pytest", "-q", "-x", f"bitkernels_tests/{test}"],
               120, {"BITKERNELS_TEST_DEVICE": "cuda"})
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and not quick:
        for tool in ("memcheck", "racecheck"):
            for name in {f: k.name for f, k in ((k.family, k) for k in reversed(found))}.values():
                yield (f"{tool} {name}", [sanitizer, "--tool", tool, "--error-exitcode", "1",
                                          python, "-c", CHECK, name], 120, {})
    sizes = ["4096", "8192"] if quick else ["4096", "8192", "16384"]
    folder = str(results())
    yield ("gemm", [python, "benchmarks/bench_gemm.py", "--sizes", *sizes, "--output", folder], 120,
           {})
    for kernel in found:
        yield (f"gemm {kernel.name}", [python, "benchmarks/bench_gemm.py", "--sizes", "8192",
                                       "--min-run-time", "0.1"], 60,
               {"BITKERNELS_CUDA_KERNEL": kernel.name})
    yield ("conv", [python, "benchmarks/bench_conv.py", "--batch", "64", "256", "--layers",
                    "3x3:64@56", "3x3:128@28", "3x3:256@14", "3x3:512@7", "--min-run-time", "0.1",
                    "--output", folder + "/cuda"], 150, {})


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
        for name, _, limit, _ in steps(("mma", "wgmma", "bulk"), chosen.quick):
            print(f"{name:28}{limit:5}")
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
    failed = []
    for name, command, limit, environment in steps(kernels.FAMILIES[arch], chosen.quick):
        if not name.startswith(tuple(chosen.only)):
            continue
        result = step(command, limit, **environment)
        report["steps"][name] = result
        path.write_text(json.dumps(report, indent=1))
        if "failed" in result:
            failed.append(name)
        print(f"{'FAILED' if 'failed' in result else 'ok':7}{name:28}{result.get('failed', '')} "
              f"{last_line(result)}", flush=True)
    print(f"\nwritten: {path}" + (f"\nFAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
