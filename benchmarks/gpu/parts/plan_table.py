"""Part plan: what plan.py chooses from, of the calls that conv and gemm timed and of more.

measured.json is the package's own with this GPU's calls put in: a call measured now replaces what
it says of the same sizes. It is written after every call. More calls are the layers of ResNet-18
with their strides, 1x1 layers and matrices of few rows, in the order below, while time is left.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import calls
import torch
from record import Record, context_works, faulty, message, rows
from schedule import end_of_job

from bitkernels.backends.cuda import kernels, plan
from parts import speed

# Output and input channels, size of the output, kernel, stride.
MORE = ((128, 64, 28, 3, 2), (256, 128, 14, 3, 2), (512, 256, 7, 3, 2), (512, 512, 14, 1, 1),
        (1024, 512, 7, 1, 1))
BATCHES = (256, 16, 1)  # the plan looks four times as far as these
MATRICES = ((1024, 1024, 1024), (64, 1024, 1024), (64, 4096, 4096))  # rows, columns, channels
SAME = ("op", "rows", "cout", "products", "real")


def more_calls(device: torch.device, cache: int = 0) -> Iterator[Callable[[], calls.Call]]:
    outputs = ("packed", "fp16")
    for batch in BATCHES:
        for cout, cin, size, kernel, stride in MORE:
            for output in outputs:
                yield partial(calls.convolution, device, cout, size, batch, output, cache,
                              cin=cin, kernel=kernel, stride=stride)
        if batch == BATCHES[0]:
            for matrix in MATRICES:
                for output in outputs:
                    yield partial(calls.product, device, *matrix, output, cache)
        if batch not in calls.BATCHES:
            for channels, size in calls.LAYERS:
                for output in outputs:
                    yield partial(calls.convolution, device, channels, size, batch, output, cache)


def known(found: Sequence[dict], folder: Path) -> list[dict]:
    """Entries of the rows of a part: times of the kernels that the plan knows, of right ones."""
    bad, wrong = faulty(folder)
    entries = []
    for row in found:
        if not row.get("entry"):
            continue
        us = {name: t for name, t in row["us"].items()
              if (name == plan.NEXT or name in kernels.ALL)
              and name not in bad and (name, row["key"]) not in wrong}
        if len(us) > 1 and plan.NEXT in us:
            entries.append({**row["entry"], "us": us})
    return entries


def merged(table: dict, arch: str, gpu: str, entries: Sequence[dict]) -> dict:
    """The table with these entries in place of those of the same calls."""
    def same(entry: dict) -> tuple:
        return tuple(entry[key] for key in SAME)

    new = {same(entry): entry for entry in entries}
    old = [entry for entry in table.get(arch, {"calls": []})["calls"] if same(entry) not in new]
    return {**table, arch: {"gpu": gpu, "date": datetime.date.today().isoformat(),
                            "torch": torch.__version__, "calls": [*new.values(), *old]}}


def write(path: Path, arch: str, gpu: str, entries: Sequence[dict]) -> None:
    table = merged(json.loads(plan.MEASURED.read_text()), arch, gpu, entries)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)


def right(call: calls.Call, device: torch.device, record: Record) -> dict[str, str]:
    """Of a call that the part `correct` has not seen: the kernels that are wrong, and how."""
    expected, found = calls.expected(call), {}
    for which in (*calls.takers(call, device), calls.TRITON):
        name = which if isinstance(which, str) else which.name
        if f"{name} {call.name}" in record.bad:
            continue
        try:
            wrong = calls.difference(call, call.run(which), expected)
        except Exception as error:
            if not context_works():
                record.broken(f"{name} {call.name}", error)
            wrong = message(error)
        if wrong is not None:
            found[name] = wrong
    return found


@torch.no_grad()
def run(folder: Path) -> None:
    record = Record(folder, "plan")
    device, cache = speed.setup()
    arch, gpu = calls.architecture(device), torch.cuda.get_device_name()
    assert arch is not None
    bad, _ = faulty(folder)
    for name in bad:
        kernels.ALL.pop(name, None)
    path = folder / "measured.json"
    first = rows(folder, "conv") + rows(folder, "gemm")
    write(path, arch, gpu, known(first, folder))
    record.add(merged=len(known(first, folder)))
    copy = speed.rate(record)
    for number, make in enumerate(more_calls(device, cache)):
        if time.time() > end_of_job():
            record.add(stopped=f"before call {number}: out of time")
            return
        try:
            call = make()
            if call.name in record.done:
                continue
            wrong = right(call, device, record)
        except Exception as error:
            if not context_works():
                raise
            record.add(failed=message(error), key=f"call {number}")
            continue
        for name in wrong:
            record.add(wrong=f"{name} in {call.name}: {wrong[name]}")
        speed.one_row(record, call, calls.COPIES, {}, copy, device, folder, wrong)
        write(path, arch, gpu, known(first + rows(folder, "plan"), folder))
