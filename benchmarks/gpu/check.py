"""One command on a GPU machine: everything compiled, checked, timed and tested, within minutes.

    python benchmarks/gpu/check.py                          all parts, 7 minutes (make gpu-check)
    python benchmarks/gpu/check.py --parts compile correct conv   some of them
    python benchmarks/gpu/check.py --minutes 3              what matters most in less time
    python benchmarks/gpu/check.py --parts compile models   whole networks in inference
    python benchmarks/gpu/check.py --parts conv ncu         with Nsight Compute reports
    python benchmarks/gpu/check.py --dry-run                parts, limits and commands; needs no GPU

Works in a plain copy of the tree with PyTorch and Triton, without git, network or an install.
Every part has processes of its own and a limit, at which they are killed. What a part finds is
written line by line to OUT/raw; after each part that is packed into OUT/results.tar.gz beside
OUT/summary.txt, which alone are left at the end, also of an interrupted run. OUT is
benchmarks/results/<gpu> unless given.

Parts that time have the GPU to themselves; before them all kernels are compiled side by side and
checked, each in a process of its own, and what hangs or is wrong there is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(path) for path in (ROOT, ROOT / "benchmarks", HERE)]

import summary  # noqa: E402
from schedule import Ended, Job, Part, run, stop  # noqa: E402

MINUTES = 7.0
SPARE = 8.0  # seconds for processes that are slow to die, for the summary and the archive
OWN = {"BITKERNELS_CUDA": "1"}  # every kernel of csrc/cuda that takes a call
UNTUNED = {"BITKERNELS_TRITON_AUTOTUNE": "0"}  # nothing is timed where others run beside it
# Test files, and over how many processes each is spread; the first ones start first.
TESTS = {"ops/test_packed_conv2d": 5, "ops/test_packed_linear": 2, "ops/test_residual_block": 4,
         "ops/test_binary_conv2d": 4, "ops/test_residual_block_parts": 2, "ops/test_sign_pack": 2,
         "ops/test_rsign": 1, "ops/test_rprelu": 1, "ops/test_packed_max_pool2d": 1,
         "ops/test_binary_linear": 2, "nn/test_packed": 2, "test_interop": 1}
# Reports of Nsight Compute: what, the call, and the kernel where the run has no fastest one.
PROFILED = ("3x3:256@14 batch 256 packed", "3x3:64@56 batch 256 block", "8192x8192x8192 packed")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child(part: str, job: str, folder: Path, **environment: str) -> Job:
    """A process of this file that runs one job of a part."""
    return Job(job, [sys.executable, str(HERE / "check.py"), "--run", part, "--job", job,
                     "--out", str(folder)], environment)


@functools.cache
def kernel_names() -> tuple[str, ...]:
    """Of the kernels of csrc/cuda for this GPU; as for an H200 without one. Takes seconds."""
    import torch

    from bitkernels.backends.cuda import kernels

    arch: str | None = "sm_90a"
    if torch.cuda.is_available():
        arch = kernels.architecture(torch.cuda.get_device_capability())
    return tuple(name for name, kernel in kernels.ALL.items()
                 if name != kernels.PREPARE.name
                 and kernel.family in kernels.FAMILIES.get(arch or "", ()))


def whole(chosen: Sequence[str]) -> list[str]:
    """What the chosen parts give torch.compile."""
    found = []
    if "train" in chosen:
        found += [f"reactnet18 {form}" for form in ("published", "bitkernels", "layers")]
    if "block" in chosen:
        found.append("block")
    if "models" in chosen:
        found += ["models quicknet", "models reactnet18", "models resnet18"]
    return found


def whole_jobs(folder: Path, chosen: Sequence[str]) -> list[Job]:
    return [child("whole", name, folder, **OWN, **UNTUNED, OMP_NUM_THREADS="1",
                  TORCHINDUCTOR_COMPILE_THREADS=str(max(1, cores() // 5)))
            for name in whole(chosen)]


def compile_jobs(folder: Path, chosen: Sequence[str]) -> list[Job]:
    return [child("compile", str(number), folder, **UNTUNED, OMP_NUM_THREADS="1")
            for number in range(max(2, cores() - 2 - len(whole(chosen)) // 2))]


def correct_jobs(folder: Path) -> list[Job]:
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "2", **UNTUNED}
    return [child("correct", name, folder, **exact)
            for name in (*kernel_names(), "triton", "triton-operators")]


def test_jobs(folder: Path) -> list[Job]:
    if importlib.util.find_spec("pytest") is None:
        return []
    return [Job(f"{name.rpartition('/')[2]}-{shard + 1}of{shards}",
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
                 f"bitkernels_tests/{name}.py"],
                {**OWN, **UNTUNED, "BITKERNELS_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1",
                 "NVIDIA_TF32_OVERRIDE": "0", "BITKERNELS_TEST_SHARD": f"{shard}/{shards}"})
            for name, shards in TESTS.items() if (ROOT / f"bitkernels_tests/{name}.py").exists()
            for shard in range(shards)]


@functools.cache
def sanitizer() -> tuple[str, ...]:
    """compute-sanitizer with its options, which look at our kernels alone; () without it."""
    beside = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    found = shutil.which("compute-sanitizer") or next(map(str, beside), None)
    if found is None:
        return ()
    said = subprocess.run([found, "--help"], capture_output=True, text=True, check=False)
    only = ("--kernel-regex", "kns=bitkernels_kernel") if "--kernel-regex" in said.stdout else ()
    return (found, "--error-exitcode", "9", "--print-limit", "20", *only)


def sanitizer_jobs(folder: Path) -> list[Job]:
    """One for each tool and family of kernels: starting Python under a sanitizer is slow. Those
    that may break the context, as no others have, are apart."""
    families: dict[str, list[str]] = {}
    for name in kernel_names() if sanitizer() else ():
        turns = "-turns" if name.endswith("_turns") else ""
        families.setdefault(name.split("_")[0] + turns, []).append(name)
    jobs = []
    for family, names in families.items():
        one = child("small", ",".join(names), folder, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
                    OMP_NUM_THREADS="1")
        jobs += [Job(f"{tool}-{family}", [*sanitizer(), "--tool", tool, *one.command],
                     one.environment) for tool in ("memcheck", "racecheck")]
    return jobs


def ncu_jobs(folder: Path) -> list[Job]:
    ncu = shutil.which("ncu")
    if ncu is None:
        return []
    (folder / "ncu").mkdir(parents=True, exist_ok=True)
    return [Job(report, [ncu, "--clock-control", "none", "--set", "full", "--import-source", "yes",
                         "-k", "regex:bitkernels_kernel", "--launch-skip", "3", "-c", "1", "-f",
                         "-o", str(folder / "ncu" / report), *child("one", name, folder).command])
            for name in PROFILED
            for report in [re.sub(r"[^A-Za-z0-9]+", "-", name)]]


def stages(folder: Path, chosen: Sequence[str], scale: float = 1.0) -> list[list[Part]]:
    """In the order of running; `first` in that of need. Only what is not timed has company."""
    def timed(name: str, seconds: float, least: float, first: int, **environment: str) -> Part:
        return Part(name, lambda: [child(name, name, folder, **environment)], seconds, least, first)

    few = max(2, cores() // 4)
    found = [
        [Part("compile", lambda: compile_jobs(folder, chosen), 80, 20, 0, at_once=64),
         Part("whole", lambda: whole_jobs(folder, chosen), 105, 20, 0, at_once=64,
              spans="correct" in chosen),
         Part("build", lambda: [child("build", "build", folder)], 100, 20, 9,
              spans="correct" in chosen)],
        [Part("correct", lambda: correct_jobs(folder), 40, 15, 1, at_once=cores(), margin=6)],
        [timed("conv", 60, 15, 2)],
        [timed("gemm", 20, 8, 3)],
        [timed("block", 40, 15, 4, **OWN)],
        [timed("trunk", 15, 8, 6)],
        [timed("train", 90, 25, 7, **OWN, **UNTUNED)],
        [timed("models", 90, 30, 7)],
        [timed("plan", 30, 8, 8)],
        [Part("tests", lambda: test_jobs(folder), 60, 30, 5, at_once=max(2, cores() - few)),
         Part("digits", lambda: [child("digits", device, folder, OMP_NUM_THREADS="2")
                                 for device in ("cuda", "cpu")], 60, 20, 9, at_once=2),
         Part("sanitizer", lambda: sanitizer_jobs(folder), 60, 20, 9, at_once=few)],
        [Part("ncu", lambda: ncu_jobs(folder), 60, 20, 9)],
    ]
    return [[scaled(part, scale) for part in stage if part.name in chosen]
            for stage in found if any(part.name in chosen for part in stage)]


def scaled(part: Part, scale: float) -> Part:
    return dataclasses.replace(part, seconds=part.seconds * scale)


PARTS = ("compile", "whole", "build", "correct", "conv", "gemm", "block", "trunk", "train",
         "models", "plan", "tests", "digits", "sanitizer", "ncu")
DEFAULT = tuple(part for part in PARTS if part not in ("models", "ncu"))


def run_job(part: str, job: str, folder: Path) -> None:
    """In a process that `child` started."""
    module, function, named = {
        "compile": ("compiling", "run", True), "whole": ("compiling", "whole", True),
        "build": ("build", "run", False), "correct": ("correct", "run", True),
        "small": ("correct", "small", True), "conv": ("speed", "conv", False),
        "gemm": ("speed", "gemm", False), "block": ("block", "run", False),
        "trunk": ("trunk", "run", False), "train": ("train", "run", False),
        "models": ("models", "run", False),
        "plan": ("plan_table", "run", False), "digits": ("digits", "run", True),
        "one": ("one", "run", True)}[part]
    call = getattr(importlib.import_module(f"parts.{module}"), function)
    call(folder, job) if named else call(folder)


def gpu_name() -> str | None:
    """As PyTorch calls the first GPU."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=30, check=True).stdout
        if said.strip():
            return said.splitlines()[0].strip()
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, str]:
    """What all processes share: the tree as it is, and caches that a second run finds again."""
    caches = Path(tempfile.gettempdir()) / f"bitkernels-gpu-check-{getattr(os, 'getuid', int)()}"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1",
            **{name: os.environ.get(name) or str(caches / folder) for name, folder in (
                ("TRITON_CACHE_DIR", "triton"), ("BITKERNELS_CACHE_DIR", "cuda"),
                ("TORCHINDUCTOR_CACHE_DIR", "inductor"))}}


def pack(out: Path, raw: Path) -> Path:
    """All of `raw` as one file."""
    path, partial = out / "results.tar.gz", out / ".results.partial"
    with tarfile.open(partial, "w:gz") as tar:
        for found in sorted(raw.rglob("*")):
            if found.is_file() and "claims" not in found.parts:
                tar.add(found, found.relative_to(raw))
    partial.replace(path)
    return path


def show(planned: Sequence[Sequence[Part]], minutes: float) -> None:
    print(f"{60 * minutes:.0f} s in all; at most, and at least, of each part:")
    for stage in planned:
        for part in stage:
            jobs = part.jobs()
            print(f"\n{part.name:10} {part.seconds:4.0f} {part.least:4.0f} s, {len(jobs)} "
                  f"process{'es' * (len(jobs) != 1)}"
                  + (f", {min(part.at_once, len(jobs))} at once" if len(jobs) > 1 else "")
                  + (f", beside {' and '.join(p.name for p in stage if p is not part)}"
                     if len(stage) > 1 else ""))
            for job in jobs[:4]:
                given = " ".join(f"{k}={v}" for k, v in job.environment.items())
                print("   ", " ".join(filter(None, [given, *job.command])))
            if len(jobs) > 4:
                print(f"    ... and {', '.join(job.name for job in jobs[4:])}")


def interrupt(number: int, frame: object) -> None:
    stop()
    raise KeyboardInterrupt


def ask_kernel_names() -> None:
    """Beside the compilation, so that nobody waits for it."""
    with contextlib.suppress(Exception):  # the part that needs them meets it again, and says so
        kernel_names()


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.time()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", metavar="PART", default=list(DEFAULT),
                        help=f"of {', '.join(PARTS)}; also with commas (all but models and ncu)")
    parser.add_argument("--minutes", type=float, default=MINUTES,
                        help="for everything (7); more than 7 makes all limits longer")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.run:
        run_job(args.run, args.job, args.out)
        return 0
    chosen = [name for names in args.parts for name in names.split(",") if name]
    unknown = [name for name in chosen if name not in PARTS]
    if unknown or not chosen:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if "compile" in chosen and whole(chosen):  # no part of its own to whoever names parts
        chosen.append("whole")
    if args.minutes <= 0:
        parser.error("--minutes must be more than 0")
    gpu = gpu_name()
    out = (args.out or ROOT / "benchmarks" / "results" / slug(gpu or "no-gpu")).resolve()
    raw = out / "raw"
    planned = stages(raw, chosen, max(1.0, args.minutes / MINUTES))
    if args.dry_run:
        show(planned, args.minutes)
        return 0
    if gpu is None:
        print("no GPU: nothing to check (--dry-run shows what would run)")
        return 1
    return follow(planned, 60 * args.minutes - (time.time() - start), out, gpu)


def follow(planned: Sequence[Sequence[Part]], budget: float, out: Path, gpu: str) -> int:
    """Runs the parts; 0 where no job failed and nothing is wrong."""
    raw, start = out / "raw", time.time()
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    os.environ.update(environment())
    threading.Thread(target=ask_kernel_names, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    state: list[dict] = []

    def write() -> tuple[str, Path]:
        text = summary.text(raw, state, gpu, time.time() - start)
        (out / "summary.txt").write_text(text)
        return text, pack(out, raw)

    def each(part: Part, seconds: float, ended: list[Ended] | None) -> None:
        failed = {one.job: one.failed for one in ended or () if one.failed}
        state.append({"part": part.name, "seconds": round(seconds, 1), "failed": failed,
                      "jobs": None if ended is None else len(ended)})
        summary.write_state(raw, state)
        print(f"{time.time() - start:5.0f} s  {summary.status(state[-1])}", flush=True)
        write()

    try:
        run(planned, budget - SPARE, raw / "log", ROOT, each)
    except KeyboardInterrupt:
        state.append({"part": "interrupted", "seconds": 0.0, "failed": {}, "jobs": None})
        print("interrupted")
    finally:
        text, packed = write()
        shutil.rmtree(raw, ignore_errors=True)
        print(f"\n{text}\nwritten: {out / 'summary.txt'}, {packed}")
    return int(any(part["failed"] for part in state) or summary.WRONG in text)


if __name__ == "__main__":
    sys.exit(main())
