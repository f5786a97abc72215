"""Part models: whole networks in inference as CUDA graphs: converted, their emulation, ResNet-18.

A row for every network: microseconds of a batch by provider of bench_models.py, and of how many
images the logits are close to the model's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import bench_models
import common
import gpu_time
import model_providers
import torch
from record import Record, message

from parts.block import run_tasks, without_faulty

SIZE, BATCH = 224, 64
NETWORKS = ("quicknet", "reactnet18", "resnet18")  # the first two have a goal
COPIES = 2  # calls in a graph


def make(name: str, device: common.Device, notes: dict[str, str]) -> model_providers.Network:
    (network,) = bench_models.make([name], SIZE, BATCH, device, True, notes)
    return network


def one(name: str, device: common.Device) -> dict:
    notes: dict[str, str] = {}
    network = make(name, device, notes)
    calls = model_providers.candidates(network, BATCH, True, notes, lambda: False)
    ms, errors = gpu_time.in_turns({label: (lambda _, call=candidate.call: call(), COPIES)
                                    for label, candidate in calls.items()})
    wrong = {label: f"{one.close} images close to the model's" for label, one in calls.items()
             if model_providers.is_wrong(one.close)}
    return {"batch": BATCH, "us": {label: round(1e3 * t, 1) for label, t in ms.items()},
            "wrong": wrong, "close": network.close, "notes": notes,
            "errors": {label: message(error) for label, error in errors.items()}}


def run(folder: Path) -> None:
    record = Record(folder, "models")
    torch.backends.cudnn.benchmark = True
    record.add(left_out=sorted(without_faulty(folder)))
    device = common.GpuDevice()
    run_tasks(record, [(f"{name} batch {BATCH}", partial(one, name, device)) for name in NETWORKS])


def warm(name: str) -> None:
    """Compiles what this part gives torch.compile."""
    device = common.GpuDevice()
    model_providers.candidates(make(name, device, {}), BATCH, True, {}, lambda: False)
    torch.cuda.synchronize()
