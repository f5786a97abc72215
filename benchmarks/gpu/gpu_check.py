"""One command on a GPU machine: is everything exact there, and how fast is it. Needs no network.

    python benchmarks/gpu/gpu_check.py             all parts, at most 8 minutes
    python benchmarks/gpu/gpu_check.py --rehearse  tiny shapes on the CPU: tests this script

Every part runs in a process of its own with a time limit, so one that fails or hangs leaves the
others alone and is recorded as such. Needs torch and Triton; the tests need pytest and numpy.
Writes benchmarks/results/<gpu>/gpu_check.json after every part and ends with a summary: what was
measured, and which goals (gpu_goals.py) it meets. Times are medians in milliseconds: `cold` with
the L2 cache swept before each call, `graph` a call in a replayed CUDA graph of ten, its operands as
warm as they fit; neither has time of the host in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_goals
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_time  # noqa: E402

LIMITS = {"selfcheck": 75, "tests": 170, "linear": 40, "conv": 70, "bandwidth": 30, "block": 90}
TIMED = ("linear", "conv", "bandwidth", "block")
MARK = "RESULT "
# Test files, and over how many processes each is spread
OPERATOR_TESTS = {"packed_conv2d": 4, "binary_conv2d": 3, "packed_linear": 2, "binary_linear": 2,
                  "sign_pack": 3, "rsign": 1, "rprelu": 1, "packed_max_pool2d": 1,
                  "residual_block_parts": 2, "residual_block": 2}
REHEARSAL = os.environ.get("BITKERNELS_GPU_CHECK_REHEARSAL") == "1"
COMPILING = os.environ.get("BITKERNELS_GPU_CHECK_COMPILE") == "1"  # run everything once, untimed
DEVICE = "cpu" if REHEARSAL else "cuda"
HALF = torch.float16
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))


def cold(fn) -> float:
    if REHEARSAL:
        start = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - start)
    return statistics.median(gpu_time.cold(fn))


def graph(fn) -> float | str:
    if REHEARSAL:
        return cold(fn)
    try:
        return statistics.median(gpu_time.graph(fn))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def compile_all(fn) -> None:
    """Runs a call in every configuration that tuning may choose."""
    from bitkernels.backends.triton import configs, tuning

    family = configs.family(torch.device(DEVICE))
    for number in range(max(len(configs.table(inner, family)) for inner in configs.INNER)):
        with tuning.fixed(number):
            fn()


def timed(candidates: dict) -> dict:
    """{name: {cold, graph}} of callables; one that fails says why and the others go on."""
    out = {}
    for name, fn in candidates.items():
        try:
            with torch.no_grad():
                if COMPILING:
                    compile_all(fn)
                else:
                    out[name] = {"cold": cold(fn), "graph": graph(fn)}
        except Exception as error:
            out[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return out


def with_inner(inner: str, fn):
    """fn with its inner product forced, each call."""
    def call():
        os.environ["BITKERNELS_TRITON_INNER"] = inner
        try:
            return fn()
        finally:
            del os.environ["BITKERNELS_TRITON_INNER"]
    return call


def inner_names() -> list[str]:
    from bitkernels.backends.triton import configs

    b1 = not REHEARSAL and configs.has_b1(configs.family(torch.device("cuda")))
    return ["popc"] if REHEARSAL else ["b1", "int8"] if b1 else ["int8"]


def words(*shape) -> torch.Tensor:
    return torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int32, device=DEVICE)


def part_selfcheck() -> dict:
    from bitkernels.backends.triton import dispatch, selfcheck

    os.environ["BITKERNELS_TRITON_AUTOTUNE"] = "0"  # the timed parts check the other tiles
    device, out = torch.device(DEVICE, None if REHEARSAL else 0), {}
    if not REHEARSAL and (reason := dispatch.why_unusable(device)):
        return {"triton": reason}
    for op in ("sign_pack", "sign_pack_mask", "mask_grad", "unpack", "packed_max_pool2d", "rsign",
               "rprelu", "rprelu_backward", "residual_block_forward", "residual_block_backward",
               "residual_block_norm_backward", "sign_backward", *dispatch.PRODUCTS):
        for inner in [*inner_names(), "popc"] if op in dispatch.PRODUCTS else [None]:
            name = op if inner is None else f"{op} {inner}"
            try:
                out[name] = selfcheck.failure(op, inner, device) or "exact"
            except Exception as error:
                out[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return out


def part_tests() -> dict:
    """The operators' tests on the GPU, and those of the products once for each inner product.

    Beside them the kernels that the other parts time are compiled, into Triton's cache on disk.
    """
    end = time.time() + LIMITS["tests"] - 15
    jobs = [(name, None, shard) for name, shards in OPERATOR_TESTS.items()
            for shard in range(shards)]
    jobs += [(name, inner, shard) for inner in inner_names()
             for name in ("packed_conv2d", "packed_linear")
             for shard in range(OPERATOR_TESTS[name])]
    with ThreadPoolExecutor(max(4, (os.cpu_count() or 1) - len(TIMED))) as pool:
        others = [_start(name, False, BITKERNELS_GPU_CHECK_COMPILE="1") for name in TIMED]
        results = dict(pool.map(lambda job: _one_test(*job, end), jobs))
    for child in others:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=max(0.1, end - time.time()))
        child.kill()
    failed = [f"{job}: {line}" for job, r in results.items() for line in r["failed"]]
    return {"passed": [job for job, r in results.items() if r["returncode"] == 0],
            "not passed": {job: r["summary"] for job, r in results.items() if r["returncode"]},
            "failed": failed[:40]}


def _one_test(name: str, inner: str | None, shard: int, end: float) -> tuple[str, dict]:
    count = OPERATOR_TESTS[name]
    label = " ".join([name, *([inner] if inner else []), f"{shard + 1}/{count}"])
    force = {} if inner is None else {"BITKERNELS_TRITON_INNER": inner}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line",
             f"bitkernels_tests/ops/test_{name}.py"],
            cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, end - time.time()),
            env={**os.environ, "BITKERNELS_TEST_DEVICE": DEVICE, "PYTHONPATH": str(ROOT),
                 "BITKERNELS_TEST_SHARD": f"{shard}/{count}", "OMP_NUM_THREADS": "2", **force})
    except subprocess.TimeoutExpired as error:
        dots = "".join(re.findall(r"^[.FEsx]+", bytes(error.stdout or b"").decode(), re.M))
        return label, {"returncode": 124, "failed": [],
                       "summary": f"out of time after {len(dots)} tests, "
                                  f"{dots.count('F') + dots.count('E')} of them failed"}
    lines = done.stdout.strip().splitlines()
    return label, {"returncode": done.returncode,
                   "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
                   "summary": lines[-1] if lines else done.stderr[-300:]}


def part_linear() -> dict:
    size = 128 if REHEARSAL else 8192
    ops = torch.ops.bitkernels
    a, w = words(size, size // 32), words(size, size // 32)
    x, y = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    candidates = {"cublas bf16": lambda: x @ y.T}
    for inner in inner_names():
        candidates[f"{inner} fp16 out"] = with_inner(
            inner, lambda: ops.packed_linear(a, w, size, dtype=HALF))
        candidates[f"{inner} packed out"] = with_inner(
            inner, lambda: ops.packed_linear.packed(a, w, size))
    return {"size": size, "times": timed(candidates)}


def part_conv() -> dict:
    torch.backends.cudnn.benchmark = True
    ops, out = torch.ops.bitkernels, {}
    for channels, size in LAYERS:
        batch = 1 if REHEARSAL else 256
        channels, size = (32, 4) if REHEARSAL else (channels, size)
        a, w = words(batch, size, size, channels // 32), words(channels, 3, 3, channels // 32)
        x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=HALF)
        f = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=torch.bfloat16)
        x, f = (t.to(memory_format=torch.channels_last) for t in (x, f))
        rival = x.bfloat16()
        candidates = {"cudnn bfloat16": lambda x=rival, f=f: F.conv2d(x, f, padding=1)}
        for inner in inner_names():
            args = w, channels, (1, 1), (1, 1)
            candidates[f"{inner} fp16 in and out"] = with_inner(
                inner, lambda x=x, args=args: ops.packed_conv2d(ops.sign_pack(x, None, 1), *args,
                                                                dtype=HALF))
            candidates[f"{inner} packed in, fp16 out"] = with_inner(
                inner, lambda a=a, args=args: ops.packed_conv2d(a, *args, dtype=HALF))
            candidates[f"{inner} packed in and out"] = with_inner(
                inner, lambda a=a, args=args: ops.packed_conv2d.packed(a, *args))
        out[f"{channels}@{size}"] = timed(candidates)
    return {"batch": batch, "layers": out}


def part_bandwidth() -> dict:
    ops = torch.ops.bitkernels
    shape = (1, 32, 4, 4) if REHEARSAL else (256, 64, 56, 56)
    x = torch.randn(shape, device=DEVICE, dtype=HALF)
    last = x.to(memory_format=torch.channels_last)
    into, grad = torch.empty_like(last), torch.randn_like(last)
    v = [torch.rand(shape[1], device=DEVICE) for _ in range(3)]
    size = x.numel()
    moved = {  # bytes that must move
        "copy": (4 * size, lambda: into.copy_(last)),
        "sign_pack nhwc": (2.125 * size, lambda: ops.sign_pack(last, v[0], 1)),
        "sign_pack nchw": (2.125 * size, lambda: ops.sign_pack(x, v[0], 1)),
        "rprelu": (4 * size, lambda: ops.rprelu(last, *v)),
        "rprelu_backward": (6 * size, lambda: ops.rprelu_backward(grad, last, v[0], v[1])),
    }
    times = timed({name: fn for name, (_, fn) in moved.items()})
    for name, (count, _) in moved.items():
        if "cold" in times.get(name, ()):
            times[name]["GB/s"] = count / times[name]["cold"] / 1e6
    return {"shape": list(shape), "times": times}


def part_block() -> dict:
    from residual_block import Block, Emulated

    torch.backends.cudnn.benchmark = True
    channels, size, batch = (32, 4, 1) if REHEARSAL else (256, 14, 256)
    ops = torch.ops.bitkernels
    x = torch.randn(batch, channels, size, size, device=DEVICE, dtype=HALF)
    x = x.to(memory_format=torch.channels_last)

    def make(kind):
        block = Block(channels)
        block.randomize(torch.Generator().manual_seed(0))
        model = kind(block) if kind else block
        return model.to(DEVICE, HALF, memory_format=torch.channels_last)

    emulated = make(Emulated).eval()
    compiled = torch.compile(emulated)
    a, w = words(batch, size, size, channels // 32), words(channels, 3, 3, channels // 32)
    v = [torch.rand(channels, device=DEVICE) for _ in range(6)]
    inference = timed({
        "eager": lambda: emulated(x), "compiled": lambda: compiled(x),
        "fused": lambda: ops.packed_conv2d.both(
            a, w, channels, (1, 1), (1, 1), scale=v[0], bias=v[1], residual=x, shift_in=v[2],
            slope=v[3], shift_out=v[4], sign_shift=v[5], dtype=HALF)})
    training = {}
    kinds = {"eager": Emulated, "compiled": Emulated, "binary": None, "binary compiled": None}
    for name, kind in kinds.items():
        try:
            block = make(kind)
            step_of = torch.compile(block) if name.endswith("compiled") else block
            leaf = x.clone().requires_grad_()

            def step(step_of=step_of, leaf=leaf):
                step_of(leaf).sum().backward()

            step()
            if COMPILING:
                continue
            row = {}
            if not REHEARSAL:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = step_of(leaf)
                row["held MiB"] = (torch.cuda.memory_allocated() - before) / 2**20
                out.sum().backward()
                row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                del out
            training[name] = {"cold": cold(step), **row}
        except Exception as error:
            training[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"block": f"{channels}@{size} batch {batch}", "inference": inference,
            "training": training}


def _start(name: str, alone: bool = True, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "--part", name], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=alone, env={**os.environ, **environment})


def _kill(child: subprocess.Popen) -> str:
    """Ends a part and what it started, or leaves one that the GPU holds; its standard error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.communicate(timeout=5)[1]
    return ""


def _warnings(stderr: str) -> list[str]:
    return [text for text in stderr.splitlines() if "bitkernels:" in text]


def run_part(name: str) -> dict:
    start = time.time()
    child = _start(name)
    try:
        stdout, stderr = child.communicate(timeout=LIMITS[name])
    except subprocess.TimeoutExpired:
        warned = _warnings(_kill(child))
        return {"warnings": warned, "error": f"took more than {LIMITS[name]} s"}
    seen = {"seconds": round(time.time() - start, 1), "warnings": _warnings(stderr)}
    for line in reversed(stdout.splitlines()):
        if line.startswith(MARK):
            return {**seen, **json.loads(line[len(MARK):])}
    return {**seen, "error": (stderr or stdout)[-1500:] or "no output"}


def show(name: str, result: dict) -> None:
    print(f"\n== {name}: {result.get('seconds', '-')} s")
    for warning in result.get("warnings", ())[:4]:
        print("  !", warning[:150])
    if "error" in result:
        print("  FAILED", result["error"].strip().splitlines()[-1][:150])
        return

    def rows(times: dict, indent: str = "  ") -> None:
        for label, row in times.items():
            if isinstance(row, dict) and not {"cold", "error"} & row.keys():
                print(f"{indent}{label}")
                rows(row, indent + "  ")
            elif isinstance(row, dict):
                cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {str(v)[:60]}"
                         for k, v in row.items())
                print(f"{indent}{label:24s}", "  ".join(cells))

    if name == "selfcheck":
        wrong = {k: v for k, v in result.items() if isinstance(v, str) and v != "exact"}
        exact = sum(v == "exact" for v in result.values())
        print(f"  {exact} exact;", "none wrong" if not wrong else f"WRONG: {wrong}")
    elif name == "tests":
        print("  passed:", ", ".join(result["passed"]))
        for job, summary in result["not passed"].items():
            print(f"  NOT PASSED {job}: {summary[:120]}")
        return
    rows({k: v for k, v in result.items() if isinstance(v, dict)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=LIMITS)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.part:
        import bitkernels  # noqa: F401

        print(MARK + json.dumps(globals()[f"part_{args.part}"]()), flush=True)
        return 0
    if args.rehearse:
        os.environ |= {"BITKERNELS_GPU_CHECK_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
        gpu = "rehearsal"
    elif not torch.cuda.is_available():
        print("no GPU: nothing to check (--rehearse tests the script itself)")
        return 1
    else:
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-").lower()
    report = {"gpu": gpu, "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"),
              "parts": {}}
    results = ROOT / "benchmarks" / "results"
    folder = Path(tempfile.mkdtemp()) if args.rehearse else results / gpu
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[gpu_goals.Goal] = []
    for name in [n for n in LIMITS if not (args.rehearse and n == "tests")]:
        report["parts"][name] = run_part(name)
        asked = list(gpu_goals.goals(report["parts"]))
        report["goals"] = [goal.record() for goal in asked]
        (folder / "gpu_check.json").write_text(json.dumps(report, indent=1))
    print(f"{gpu}, torch {torch.__version__}; times in ms")
    for name, result in report["parts"].items():
        show(name, result)
    print("\n== goals", "(a rehearsal: nothing is shown)" if args.rehearse else "(for an H200)")
    for goal in asked:
        print(" ", goal.line())
    print(f"\nwritten: {folder / 'gpu_check.json'}")
    exact = all(goal.met is not False for goal in asked[:2])
    return int(not exact or any("error" in r for r in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
