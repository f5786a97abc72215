"""Part compile: everything that later parts run, compiled by many processes into the disk caches.

The jobs of all processes are one list; who makes the file of a job's name does the job. Kernels
of csrc/cuda are compiled and loaded but not launched: one that hangs must hang where it is checked.
Triton's run, and so do whole networks under torch.compile, in processes of their own, on whatever
the kernels that are not launched leave in memory.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import calls
import torch
import torch._inductor.config as inductor
from record import Record, message
from schedule import end_of_job

from bitkernels.backends.cuda import dispatch, kernels, launch
from bitkernels.backends.cuda import selfcheck as cuda_selfcheck
from bitkernels.backends.triton import dispatch as triton
from parts import block, correct, models, plan_table, train


def without_launches(driver) -> None:
    """Lets a driver build and load kernels, and launch none."""
    for name in dir(type(driver)):
        if name.startswith("launch"):
            setattr(driver, name, lambda *args, **kw: None)


def build_small(kernel: kernels.Kernel, device: torch.device) -> None:
    """The kernel for the cases of the package's own check."""
    for op in dispatch.OPS:
        for args, kw in cuda_selfcheck.cases(op):
            if kernel in launch.taking((kernel.family,), op, args, kw):
                moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
                getattr(launch, op)(kernel, *moved, **{
                    k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in kw.items()})


def build(which: kernels.Kernel, call: calls.Call) -> None:
    call.run(which)


def run_tiles(call: calls.Call) -> None:
    for name in calls.tiles(call):
        call.run(name)
    torch.cuda.synchronize()


def fails(error: Exception) -> None:
    raise error


def of_calls(found: Iterable[Callable[[], calls.Call]], device: torch.device
             ) -> Iterator[tuple[str, Callable[[], object]]]:
    for number, make in enumerate(found):
        try:
            call = make()
            takers = calls.takers(call, device)
        except Exception as error:  # recorded as a job's
            yield f"call {number}", partial(fails, error)
            continue
        yield f"triton {call.name}", partial(run_tiles, call)
        for kernel in takers:
            yield f"{kernel.name} {call.name}", partial(build, kernel, call)


def jobs(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What matters most first. Shapes do not depend on the batch but for Triton's."""
    def convolutions(batches: Sequence[int]) -> list[Callable[[], calls.Call]]:
        return [make for *_, make in calls.convolutions(device, batches=batches)]

    yield from of_calls(convolutions(calls.BATCHES[:1]), device)
    yield from of_calls([partial(calls.product, device, size, size, size, output)
                         for size in calls.SIZES for output in ("packed", "fp16")], device)
    for kernel in calls.own_kernels(calls.architecture(device)):
        yield f"{kernel.name} small cases", partial(build_small, kernel, device)
    for name, failure in correct.samples(correct.OPERATORS, device):
        yield f"triton {name}", failure
    yield from of_calls(convolutions(calls.BATCHES[1:]), device)
    yield from of_calls(plan_table.more_calls(device), device)


def claim(folder: Path, name: str) -> bool:
    """Whether this process does a job."""
    try:
        os.close(os.open(folder / re.sub(r"[^A-Za-z0-9]+", "-", name),
                         os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def work(record: Record, found: Iterator[tuple[str, Callable[[], object]]], claims: Path) -> None:
    claims.mkdir(parents=True, exist_ok=True)
    for name, job in found:
        if time.time() > end_of_job():
            record.add(stopped=f"before {name}: out of time")
            return
        if not claim(claims, name):
            continue
        start = time.time()
        try:
            job()
            failed = {}
        except Exception as error:
            failed = {"failed": message(error)}
        record.add(key=name, seconds=round(time.time() - start, 2), **failed)


@torch.no_grad()
def run(folder: Path, name: str) -> None:
    """name: a number of one of the processes."""
    device = torch.device("cuda", torch.cuda.current_device())
    record = Record(folder, f"compile-{name}")
    reason = dispatch.why_unusable(device)
    if reason is None:
        without_launches(launch.driver())
    else:
        record.add(key="csrc/cuda", failed=reason)
    reason = triton.why_unusable(device)
    if reason is not None:
        record.add(key="triton", failed=reason)
    work(record, jobs(device), folder / "claims")


def whole(folder: Path, name: str) -> None:
    """name: `block`, a network and a form of it: their torch.compile, by a few steps; or `models`
    and a network in inference."""
    record = Record(folder, f"compile-{name.replace(' ', '-')}")
    start = time.time()
    if dispatch.why_unusable(torch.device("cuda", torch.cuda.current_device())) is None:
        without_launches(launch.driver())
        dispatch.trust.has = lambda *args: True  # type: ignore[method-assign]
    try:
        # What Inductor times here, beside others, must not be what it goes by where we time it.
        inductor.autotune_local_cache = False
        if name == "block":
            block.warm()
        elif name.startswith("models "):
            models.warm(name.partition(" ")[2])
        else:
            train.warm(*name.split())
        record.add(key=f"torch.compile {name}", seconds=round(time.time() - start, 2))
    except Exception as error:
        record.add(key=f"torch.compile {name}", failed=message(error))
