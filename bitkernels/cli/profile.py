"""`python -m bitkernels profile`: where the time of a converted network goes."""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch

from bitkernels.cli import zoo
from bitkernels.converter import convert, load_converted
from bitkernels.converter.inputs import Input
from bitkernels.converter.profile import profile
from bitkernels.models import create_model
from bitkernels.models.registry import entry
from bitkernels.train.errors import first_line

DESCRIPTION = """\
Where the time of a network goes that bitkernels.convert made one graph of: each product of bits,
each real layer, and the glue between them.

  python -m bitkernels profile quicknet --threads 1
  python -m bitkernels profile reactnet_a --batch 8 --chart reactnet.png
  python -m bitkernels profile network.safetensors     a file of bitkernels.save_converted

A published network has the weights it starts with, which do not change its time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", help="a published network, a file, or the folder "
                        "of a training or of save_pretrained")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--size", type=int, help="the side of an image; default: as published")
    parser.add_argument("--repeats", type=int, default=20, help="default: 20")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--chart", metavar="FILE", help="draw multiply-adds against time")


def main(options: argparse.Namespace) -> int:
    try:
        zoo.check(options, "batch", "repeats")
        if options.chart is not None and not _can_hold_a_file(options.chart):
            raise ValueError(f"--chart must be a file in a folder that there is, got "
                             f"{options.chart!r}")
        device = zoo.prepared(options)
        if zoo.has_config(options.model):
            model, shape = zoo.saved(options.model, options.size)
            inputs = [torch.randn(options.batch, *shape, device=device)]
            network = convert(model.to(device), inputs[0])
        elif os.path.exists(options.model):
            if options.size is not None:
                raise ValueError("--size is for published networks; a file has its own")
            network = load_converted(options.model, device)
            inputs = [_example(known, options.batch, device) for known in network.inputs]
        elif os.path.splitext(options.model)[1] or os.path.dirname(options.model):
            raise ValueError(f"there is no file {options.model}")
        else:
            side = options.size or entry(options.model).image_size
            inputs = [torch.randn(options.batch, 3, side, side, device=device)]
            model = create_model(options.model, **zoo.sized(options.model, side)).to(device)
            network = convert(model, inputs[0])
        found = profile(network, *inputs, repeats=options.repeats)
        if options.chart is not None:
            found.chart(options.chart)
    except zoo.MENDABLE as error:
        print(f"bitkernels profile: {first_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


def _can_hold_a_file(path: str) -> bool:
    return "\0" not in path and not os.path.isdir(path) and os.path.isdir(
        os.path.dirname(path) or ".")


def _example(known: Input, batch: int, device: torch.device) -> torch.Tensor:
    """Values for an input of a file: random ones, and integers that are 0, so that they are in
    range whatever they count."""
    sizes = [batch if i == 0 and isinstance(n, str) else example
             for i, (n, example) in enumerate(zip(known.sizes, known.example, strict=True))]
    assert known.dtype is not None
    if known.dtype.is_floating_point:
        return torch.randn(sizes, device=device).to(known.dtype)
    return torch.zeros(sizes, dtype=known.dtype, device=device)
