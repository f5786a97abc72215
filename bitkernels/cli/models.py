"""`python -m bitkernels models`: the networks and what they weigh."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch

import torch

from bitkernels import models
from bitkernels.cli import zoo
from bitkernels.cli.summary import build
from bitkernels.counting.result import aligned
from bitkernels.models.registry import entry
from bitkernels.optim import binary_weights
from bitkernels.train.errors import first_line

DESCRIPTION = """\
The networks: their parameters, and their bytes in float32 and packed. First the published ones, by
default as published; then the classes for images of any size, by default for ten classes and 32x32.

  python -m bitkernels models
  python -m bitkernels models reactnet-18 --num-classes 1000 --size 224
  python -m bitkernels models 'quicknet*' --in-channels 1

"binary" are the weights that become one bit, "real" all other parameters. "packed" is the state of
the model after bitkernels.nn.pack, running statistics included, "float32" that before it. Layer by
layer: python -m bitkernels summary NAME.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="of these networks, or a pattern; default: all")
    parser.add_argument("--num-classes", type=int, help="default: as published; 10")
    parser.add_argument("--in-channels", type=int, default=3, help="of the images; default: 3")
    parser.add_argument("--size", type=int, help="the side of an image; default: as published; 32")


def weigh(model: torch.nn.Module) -> list[str]:
    """Binary and real parameters, bytes in float32 and packed, their ratio."""
    binary = sum(weight.numel() for weight in binary_weights(model).values())
    real = sum(p.numel() for p in model.parameters()) - binary
    before = _bytes(model)
    packed = _bytes(zoo.packed(model))
    return [f"{binary:,}", f"{real:,}", f"{before / 1e6:.2f}", f"{packed / 1e6:.2f}",
            f"{before / packed:.1f}x"]


def _bytes(model: torch.nn.Module) -> int:
    """Of its state_dict."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def main(options: argparse.Namespace) -> int:
    from bitkernels.train import recipes

    try:
        zoo.check(options, "in_channels")
        for pattern in options.names:
            if not any(fnmatch(n, pattern) for n in (*models.list_models(), *models.names())):
                raise ValueError(f"no model is called {pattern!r}; there are "
                                 f"{', '.join(sorted({*models.list_models(), *models.names()}))}")
        tables = []
        for published, names in ((True, models.list_models()), (False, models.names())):
            rows = [["model", "binary", "real", "float32 MB", "packed MB", "smaller",
                     "top-1 %" if published else "recipes"]]
            for name in names:
                if options.names and not any(fnmatch(name, p) for p in options.names):
                    continue
                try:
                    model, _ = build(name, options.num_classes, options.in_channels, options.size,
                                     published=published)
                except (RuntimeError, ValueError) as error:
                    raise ValueError(f"{name} with --in-channels {options.in_channels} --size "
                                     f"{options.size}: {first_line(error)}") from None
                last = (str(entry(name).top1 or "-") if published else " ".join(
                    recipe for recipe in recipes.names() if recipes.get(recipe).model == name))
                rows.append([name, *weigh(model), last])
            if len(rows) > 1:
                tables.append(rows)
    except zoo.MENDABLE as error:
        print(f"bitkernels models: {first_line(error)}", file=sys.stderr)
        return 1
    print("\n\n".join("\n".join(aligned(rows, left=(0, 6))) for rows in tables))
    return 0
