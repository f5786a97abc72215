"""`python -m bitkernels models`: the bundled networks and what they weigh."""

from __future__ import annotations

import argparse
import sys

from bitkernels import models

DESCRIPTION = """\
The bundled networks: their parameters, and their bytes in float32 and packed.

  python -m bitkernels models
  python -m bitkernels models reactnet-18 --num-classes 1000 --size 224
  python -m bitkernels models quicknet --in-channels 1 --size 8

"binary" are the weights that become one bit, "real" all other parameters. "packed" is the state of
the model after bitkernels.nn.pack, running statistics included, "float32" that before it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("names", nargs="*", metavar="NAME", help="of these networks; default: all")
    parser.add_argument("--num-classes", type=int, default=10, help="default: 10")
    parser.add_argument("--in-channels", type=int, default=3, help="of the images; default: 3")
    parser.add_argument("--size", type=int, default=32, help="the side of an image; default: 32")


def row(name: str, num_classes: int, in_channels: int, size: int) -> list[str]:
    """name, binary and real parameters, bytes in float32 and packed."""
    from bitkernels import nn as bnn
    from bitkernels.optim import binary_weights

    model = models.create(name, num_classes=num_classes, in_channels=in_channels, image_size=size)
    binary = sum(weight.numel() for weight in binary_weights(model).values())
    real = sum(p.numel() for p in model.parameters()) - binary
    before = _bytes(model)
    packed = bnn.pack(model.eval(), filter=lambda _, layer: layer.pack_obstacle() is None)
    return [name, f"{binary:,}", f"{real:,}", f"{before / 1e6:.2f}", f"{_bytes(packed) / 1e6:.2f}",
            f"{before / _bytes(packed):.1f}x"]


def _bytes(model) -> int:
    """Of its state_dict."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def main(options: argparse.Namespace) -> int:
    from bitkernels.train import recipes

    for name in ("num_classes", "in_channels", "size"):
        if getattr(options, name) < 1:
            return _failed(f"--{name.replace('_', '-')} must be at least 1, got "
                           f"{getattr(options, name)}")
    unknown = [name for name in options.names if name not in models.names()]
    if unknown:
        return _failed(f"no model is called {unknown[0]!r}; there are {', '.join(models.names())}")
    rows = [["model", "binary", "real", "float32 MB", "packed MB", "smaller", "recipes"]]
    for name in options.names or models.names():
        made_for = [recipe for recipe in recipes.names() if recipes.get(recipe).model == name]
        try:
            found = row(name, options.num_classes, options.in_channels, options.size)
        except (RuntimeError, ValueError) as error:
            return _failed(f"{name} with --in-channels {options.in_channels} --size "
                           f"{options.size}: {str(error).splitlines()[0]}")
        rows.append([*found, " ".join(made_for)])
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    for line in rows:
        cells = [cell.ljust(width) if i in (0, 6) else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print(f"\nfor {options.num_classes} classes and images of {options.in_channels}x{options.size}x"
          f"{options.size}")
    return 0


def _failed(text: str) -> int:
    print(f"bitkernels models: {text}", file=sys.stderr)
    return 1
