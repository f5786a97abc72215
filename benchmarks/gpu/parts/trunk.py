"""Part trunk: the 16 packed 3x3 convolutions of bench_trunk.py in one CUDA graph, beside cuDNN's.

`mixed` runs each layer in the kernel that the part conv found fastest at that size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_trunk
import calls
import common
import gpu_time
import torch
from gpu_backends import backend
from record import Record, message
from torch import Tensor

from bitkernels.backends.cuda import kernels
from parts.block import fastest, on, run_tasks, without_faulty

BATCHES = (64, 1)
COPIES = {64: 4, 1: 10}
ops = torch.ops.bitkernels


def mixed(trunk: bench_trunk.Trunk, folder: Path) -> tuple[Callable[[int], list[Tensor]], list]:
    """(the trunk, the kernel of each layer), by measurements of this run where there are any."""
    chosen: list[str | None] = []
    size = trunk.size
    for args, kw in trunk.layers:
        size = -(-size // args[2][0])
        name = f"3x3:{kw['out_channels']}@{size} batch {trunk.batch} packed"
        chosen.append(fastest(folder, name) if args[2][0] == 1 else None)
    for i, name in enumerate(chosen):  # a layer of stride 2: that of its stage
        if name is None and i + 1 < len(chosen):
            chosen[i] = chosen[i + 1]

    def run(_: int) -> list[Tensor]:
        outputs = [trunk.words]
        with backend("cuda"):
            for (args, kw), name in zip(trunk.layers, chosen, strict=True):
                if name is None:
                    os.environ.pop("BITKERNELS_CUDA_KERNEL", None)
                else:
                    os.environ["BITKERNELS_CUDA_KERNEL"] = name
                outputs.append(ops.packed_conv2d.packed(outputs[-1], *args, **kw))
        os.environ.pop("BITKERNELS_CUDA_KERNEL", None)
        return outputs[1:]

    return run, chosen


def expected(trunk: bench_trunk.Trunk) -> list[Tensor]:
    """The words of every layer, without the package."""
    outputs = [trunk.words]
    for filters, ((_, *rest), kw) in zip(trunk.filters, trunk.layers, strict=True):
        call = calls.Call("", "packed_conv2d", ((outputs[-1], None),), (filters, *rest),
                          {"real": False, "packed": True, "threshold": kw["threshold"]}, 0, 0)
        words = calls.expected(call)[1]
        assert words is not None
        outputs.append(words)
    return outputs[1:]


def one(batch: int, folder: Path) -> dict:
    torch.manual_seed(0)
    trunk = bench_trunk.Trunk(bench_trunk.DEPTH, bench_trunk.SIZE, batch, common.GpuDevice())
    best, names = mixed(trunk, folder)
    ours = {"triton": on(None, "triton", trunk), "cuda": on(None, "cuda", trunk), "mixed": best}
    wrong: dict[str, str] = {}
    with torch.no_grad():
        right = expected(trunk)
        for name, run in list(ours.items()):
            try:
                if not bench_trunk.matches(partial(run, 0), right):
                    wrong[name] = "differs from the reference"
            except Exception as error:
                wrong[name] = message(error)
                del ours[name]
        runs = ours | {name: (lambda _, call=call: call()) for name, call in trunk.real().items()}
        us, errors = gpu_time.in_turns({name: (run, COPIES[batch]) for name, run in runs.items()})
    return {"batch": batch, "us": {name: round(1e3 * t, 2) for name, t in us.items()},
            "wrong": wrong, "kernels": names,
            "errors": {name: message(error) for name, error in errors.items()}}


def run(folder: Path) -> None:
    record = Record(folder, "trunk")
    record.add(left_out=sorted(without_faulty(folder)), kernels=sorted(kernels.ALL))
    run_tasks(record, [(f"batch {batch}", partial(one, batch, folder)) for batch in BATCHES])
