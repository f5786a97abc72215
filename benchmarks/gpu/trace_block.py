"""Kernels of one training step of the residual block: ours, and the compiled emulation.

    python benchmarks/gpu/trace_block.py FOLDER            about a minute on a GPU

At 256@14 and 64@56, batch 256, float16, channels last, by torch.profiler: device time and launches
of a step. The output's gradient is a tensor that lies there, and gradients are dropped after each
step: a sum as the loss would add its own reduction, an expanded gradient that every form first
copies, and sums into the gradients of the step before. FOLDER/trace_block.txt has the tables,
FOLDER/trace_block.json the totals.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from residual_block import Block, Emulated, training_step

SHAPES, BATCH, STEPS, LINES = ((256, 14), (64, 56)), 256, 10, 40
FORMS = ("ours", "emulation compiled", "emulation")


def model(form: str, channels: int):
    block = Block(channels)
    block.randomize(torch.Generator().manual_seed(0))
    made = block if form == "ours" else Emulated(block)
    made = made.to("cuda", torch.float16, memory_format=torch.channels_last)
    if not form.endswith("compiled"):
        return made, made
    torch._dynamo.reset()
    return torch.compile(made), made


def trace(form: str, channels: int, side: int) -> tuple[float, float, list[tuple]]:
    """(device us a step, launches a step, (us, launches, name) of each kernel)."""
    called, owner = model(form, channels)
    x, grad = (torch.randn(BATCH, channels, side, side, device="cuda", dtype=torch.float16).to(
        memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()

    def step() -> None:
        training_step(called, x, grad)

    assert owner.training
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found = [(event.self_device_time_total / STEPS, event.count / STEPS, event.key)
             for event in profiled.key_averages()
             if event.device_type == torch.autograd.DeviceType.CUDA]
    found.sort(reverse=True)
    return sum(us for us, *_ in found), sum(count for _, count, _ in found), found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS[:2])
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    totals: dict = {"device": torch.cuda.get_device_name(), "batch": BATCH}
    with (options.folder / "trace_block.txt").open("w") as file:
        for channels, side in SHAPES:
            for form in options.forms:
                name = f"{form} {channels}@{side}"
                try:
                    us, launches, rows = trace(form, channels, side)
                except Exception:  # the other tables are worth having
                    totals[name] = {"error": traceback.format_exc()[-2000:]}
                    print(f"== {name}: failed\n{totals[name]['error']}", file=file, flush=True)
                    continue
                totals[name] = {"us": us, "launches": launches}
                title = f"== {name}: device us a step {us:.1f}, launches a step {launches:.1f}"
                print(title, flush=True)
                print(title, *(f"{t:9.2f} us  x{n:5.1f}  {key[:110]}" for t, n, key in
                               rows[:LINES]), sep="\n", file=file, flush=True)
                (options.folder / "trace_block.json").write_text(json.dumps(totals, indent=1))
    (options.folder / "trace_block.json").write_text(json.dumps(totals, indent=1))


if __name__ == "__main__":
    main()
