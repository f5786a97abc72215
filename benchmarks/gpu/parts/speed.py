"""Parts conv and gemm: microseconds of every kernel that takes a call, in CUDA graphs, in turns.

A row has `us`, with operands that change from call to call as far as they would stay in the L2
cache, and `warm`, with the same ones each time; both by kernel, the library's beside ours. Kernels
that the part `correct` found to be wrong there are left out and named. `triton` is the tile that a
user gets; in large calls `triton:0` and so on are each of those that there are.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import calls
import gpu_time
import torch
import torch.nn.functional as F
from calls import Call
from record import Record, context_works, faulty, message
from schedule import end_of_job

from bitkernels.backends.cuda import dispatch, launch

Run = Callable[[int], object]
LONG = 0.3  # milliseconds of a call from which on it does not matter what the L2 cache held
BESIDE_LIBRARY = ("packed", "fp16 from fp16")  # outputs that cuDNN is timed beside


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(1 << 29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.numel() / statistics.median(gpu_time.cold(lambda: target.copy_(source), 9))


def library(device: torch.device, channels: int, size: int, batch: int, cache: int, copies: int
            ) -> dict[str, Run]:
    """cuDNN's convolution in bf16 and fp16, channels-last, its input in sets too."""
    torch.backends.cudnn.benchmark = True
    found: dict[str, Run] = {}
    for name, dtype in (("cudnn bf16", torch.bfloat16), ("cudnn fp16", torch.float16)):
        def image(count: int, side: int, dtype=dtype) -> torch.Tensor:
            x = torch.randn(count, channels, side, side, device=device, dtype=dtype)
            return x.to(memory_format=torch.channels_last)

        sets = calls.sets_of(lambda image=image: (image(batch, size), None), cache, copies)
        weight = image(channels, 3)
        found[name] = lambda i, s=sets, w=weight: F.conv2d(s[i % len(s)][0], w, padding=1)
    return found


def entry(call: Call) -> dict | None:
    """What plan.py tells a call by."""
    if call.op not in dispatch.OPS or call.real_input or call.kw.get("residual") is not None:
        return None
    try:
        problem = launch.problem(call.op, *call.arguments())
    except Exception:  # an operator that the plan does not choose for
        return None
    rows, cout, products = problem.sizes
    return {"op": call.op, "rows": rows, "cout": cout, "products": products, "real": problem.real}


def measure(call: Call, copies: int, others: dict[str, Run], left_out: dict[str, str],
            device: torch.device) -> dict:
    """A row without its key."""
    runs: dict[str, Run] = {}
    tiles: tuple[str, ...] = ()
    if calls.TRITON not in left_out:
        with contextlib.suppress(Exception):  # without a kernel there, `triton` itself says why
            tiles = calls.tiles(call)
    for which in (*calls.takers(call, device), calls.TRITON, *tiles):
        name = which if isinstance(which, str) else which.name
        if name not in left_out:
            runs[name] = lambda i, which=which: call.run(which, i)
    runs |= others
    us, errors = gpu_time.in_turns({name: (run, copies) for name, run in runs.items()},
                                   rounds=9 if copies > 5 else 5)
    warm: dict[str, float] = {}
    if len(call.sets) > 1 and min(us.values(), default=0.0) < LONG:
        warm, _ = gpu_time.in_turns({name: (lambda i, run=runs[name]: run(0), copies)
                                     for name in us}, rounds=5)
    return {"us": {name: round(1e3 * t, 3) for name, t in us.items()},
            "warm": {name: round(1e3 * t, 3) for name, t in (warm or us).items()},
            "errors": {name: message(error) for name, error in errors.items()} | left_out}


def one_row(record: Record, call: Call, copies: int, others: dict[str, Run], copy: float,
            device: torch.device, folder: Path, wrong_here: Mapping[str, str] | None = None,
            **more: object) -> None:
    """wrong_here: kernels that are not exact in this call, and how, beside those of `correct`."""
    if call.name in record.bad:
        return
    bad, wrong = faulty(folder)
    left_out = {name: "hung or broke the GPU when it was checked" for name in bad}
    left_out |= {name: "not exact when it was checked" for name, key in wrong if key == call.name}
    left_out |= {name.removesuffix(f" {call.name}"): "broke the GPU" for name in record.bad
                 if name.endswith(f" {call.name}")}
    left_out |= wrong_here or {}
    start = time.time()
    try:
        row = measure(call, copies, others, left_out, device)
    except gpu_time.Broken as error:
        record.broken(f"{error.name} {call.name}", error.__cause__ or error)
        return
    except Exception as error:
        if not context_works():
            record.broken(call.name, error)
        record.add(key=call.name, failed=message(error), **more)
        return
    # The plan knows no residual and no type: fp16 and int16 stand for what is written.
    tag = {} if call.name.endswith(("block", "int32")) else {"entry": entry(call)}
    record.add(key=call.name, **more, **row, **tag, copies=copies, sets=len(call.sets),
               floors={k: round(t, 3) for k, t in call.floors(copy).items()},
               seconds=round(time.time() - start, 2))


def setup() -> tuple[torch.device, int]:
    """(the device, bytes of its L2 cache)."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    return device, getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)


def out_of_time(record: Record, what: str) -> bool:
    if time.time() < end_of_job():
        return False
    record.add(stopped=f"before {what}: out of time")
    return True


def rate(record: Record) -> float:
    copy = copy_rate()
    record.add(copy=copy, gpu=torch.cuda.get_device_name())
    return copy


@torch.no_grad()
def conv(folder: Path) -> None:
    record = Record(folder, "conv")
    device, cache = setup()
    copy = rate(record)
    for layer, batch, output, make in calls.convolutions(device, cache):
        if out_of_time(record, f"{layer} batch {batch} {output}"):
            return
        copies, others = calls.conv_copies(batch), {}
        try:
            call = make()
            if call.name in record.done:
                continue
            if output in BESIDE_LIBRARY:
                channels, size = map(int, layer.split("@"))
                others = library(device, channels, size, batch, cache, copies)
        except Exception as error:
            record.add(key=f"{layer} batch {batch} {output}", failed=message(error))
            continue
        one_row(record, call, copies, others, copy, device, folder, layer=layer, batch=batch,
                output=output)
        del call, others


@torch.no_grad()
def gemm(folder: Path) -> None:
    record = Record(folder, "gemm")
    device, cache = setup()
    copy = rate(record)
    for size in calls.SIZES:
        x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        copies = calls.gemm_copies(size)
        for output in ("packed", "fp16"):
            call = calls.product(device, size, size, size, output, cache, copies)
            if out_of_time(record, call.name):
                return
            if call.name not in record.done:
                others: dict[str, Run] = {"cublas bf16": lambda i, x=x, y=y: torch.mm(x, y.T)}
                one_row(record, call, copies, others, copy, device, folder, size=size,
                        output=output)
