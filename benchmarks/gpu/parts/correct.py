"""Part correct: one kernel, in a process of its own, against the reference and exact products.

First the small cases of the package's own check, then every call that the parts conv and gemm time.
`begun` is written before each, so that a kernel that hangs is known by its last line.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import calls
import torch
from record import Record, context_works, message
from schedule import end_of_job

from bitkernels.backends.cuda import dispatch, kernels
from bitkernels.backends.cuda import selfcheck as cuda_selfcheck
from bitkernels.backends.triton import configs
from bitkernels.backends.triton import dispatch as triton
from bitkernels.backends.triton import selfcheck as triton_selfcheck

SMALL = "small cases"


def samples(which: kernels.Kernel | str, device: torch.device
            ) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(what is checked, what is wrong with it) of the package's own cases."""
    if isinstance(which, kernels.Kernel):
        for op in (("packed_linear",) if which in kernels.BULK else dispatch.OPS):
            yield f"{SMALL} of {op}", lambda op=op: cuda_selfcheck.failure(op, which, device)
        return
    inners = [name for name in configs.INNER if name != "b1" or configs.has_b1(
        configs.family(device))]
    for op in triton.OPERATORS:
        for inner in inners if op in triton.PRODUCTS else [None]:
            yield (f"{SMALL} of {op}" + (f" by {inner}" if inner else ""),
                   lambda op=op, inner=inner: triton_selfcheck.failure(op, inner, device))


def timed_calls(device: torch.device) -> Iterator[Callable[[], calls.Call]]:
    for *_, make in calls.convolutions(device):
        yield make
    for size in calls.SIZES:
        for output in ("packed", "fp16"):
            yield partial(calls.product, device, size, size, size, output)


def large(which: kernels.Kernel | str, device: torch.device
          ) -> Iterator[tuple[str, Callable[[], str | None]]]:
    for number, make in enumerate(timed_calls(device)):
        try:
            call = make()
            takes = isinstance(which, str) or which in calls.takers(call, device)
        except Exception as error:
            yield f"call {number}", partial(message, error)
            continue
        if isinstance(which, str):
            yield call.name, partial(every_tile, call)
        elif takes:
            yield call.name, partial(exact, which, call)


def exact(which: kernels.Kernel, call: calls.Call) -> str | None:
    """Once more with filters that have been read before, behind the same kernel."""
    right = calls.expected(call)
    for which_time in ("", ", the second time"):
        wrong = calls.difference(call, call.run(which), right)
        if wrong is not None:
            return wrong + which_time
    return None


def every_tile(call: calls.Call) -> str | None:
    """Of Triton's kernel in each configuration that tuning may choose."""
    right = calls.expected(call)
    for name in calls.tiles(call):
        wrong = calls.difference(call, call.run(name), right)
        if wrong is not None:
            return f"{wrong}, configuration {name}"
    return None


def with_memory(failure: Callable[[], str | None], patience: float = 1.0) -> str | None:
    """What `failure` says. Others share the GPU's memory: without room, once more a bit later."""
    for _ in range(4):
        with contextlib.suppress(torch.OutOfMemoryError):
            found = failure()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return found
        torch.cuda.empty_cache()
        time.sleep(patience)
    return failure()


def check(record: Record, which: kernels.Kernel | str, device: torch.device,
          checks: Iterator[tuple[str, Callable[[], str | None]]]) -> bool:
    """Whether it went on to the end."""
    name = which if isinstance(which, str) else which.name
    for key, failure in checks:
        if time.time() > end_of_job():
            record.add(kernel=name, stopped=f"before {key}: out of time")
            return False
        record.add(kernel=name, begun=key)
        start = time.time()
        try:
            wrong = with_memory(failure)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            wrong = message(error)
        broken = {} if context_works() else {"broken": True}
        record.add(kernel=name, key=key, wrong=wrong, seconds=round(time.time() - start, 2),
                   **broken)
        if broken:
            return False
    record.add(kernel=name, stopped=None)
    return True


OPERATORS = "triton-operators"  # a job: the small cases of Triton's kernels


@torch.no_grad()
def run(folder: Path, name: str) -> None:
    """name: of a kernel of csrc/cuda, `calls.TRITON` or `OPERATORS`."""
    device = torch.device("cuda", torch.cuda.current_device())
    record = Record(folder, f"correct-{name}")
    torch.manual_seed(0)
    if name == OPERATORS:
        check(record, name, device, samples(name, device))
    elif name == calls.TRITON:
        check(record, name, device, large(name, device))
    else:
        which = kernels.ALL[name]
        reason = dispatch.why_unusable(device)
        if reason is not None:
            record.add(kernel=name, key=SMALL, wrong=reason)
        elif check(record, which, device, samples(which, device)):
            check(record, which, device, large(which, device))


@torch.no_grad()
def small(folder: Path, names: str) -> None:
    """The small cases of kernels alone, as a sanitizer runs them; exit code 1 for wrong ones."""
    device, failed = torch.device("cuda", torch.cuda.current_device()), False
    for name in names.split(","):
        for key, failure in samples(kernels.ALL[name], device):
            wrong = failure()
            torch.cuda.synchronize()
            print(name, key, wrong or "exact", flush=True)
            failed |= wrong is not None
    if failed:
        raise SystemExit(1)
