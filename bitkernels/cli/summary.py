"""`python -m bitkernels summary`: what each layer of a network weighs and multiplies."""

from __future__ import annotations

import argparse
import sys

import torch

from bitkernels import models
from bitkernels.cli import zoo
from bitkernels.counting import summary
from bitkernels.models.registry import entry
from bitkernels.train.errors import first_line

DESCRIPTION = """\
Every layer of a network: the bits of its input, its output, weights by bits, bytes and
multiply-adds; and the totals as Larq, ReActNet and BNext count them. Nothing is computed.

  python -m bitkernels summary quicknet
  python -m bitkernels summary quicknet_small --num-classes 10 --size 64 --depth 2
  python -m bitkernels summary reactnet-18 --json

From Python, of any model: print(bitkernels.summary(model, (3, 224, 224))).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="NAME", help="of python -m bitkernels models")
    parser.add_argument("--num-classes", type=int, help="default: as published")
    parser.add_argument("--in-channels", type=int, default=3, help="of the images; default: 3")
    parser.add_argument("--size", type=int, help="the side of an image; default: as published")
    parser.add_argument("--depth", type=int, help="join what lies deeper than so many names")
    parser.add_argument("--packed", action="store_true", help="of the packed network")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    try:
        zoo.check(options, "in_channels", "depth")
        model, size = build(options.model, options.num_classes, options.in_channels, options.size)
        if options.packed:
            model = zoo.packed(model)
        found = summary(model, (1, options.in_channels, size, size), depth=options.depth)
    except zoo.MENDABLE as error:
        print(f"bitkernels summary: {first_line(error)}", file=sys.stderr)
        return 1
    print(found.to_json() if options.json else found)
    return 0


def build(name: str, num_classes: int | None, in_channels: int, size: int | None,
          published: bool | None = None, device: str = "meta") -> tuple[torch.nn.Module, int]:
    """A network, without values unless the device has some, and its image's side.

    published: of `create_model`, else of `create`; None: the first of the two that has the name.
    Raises ValueError for a name that there is not, and as the network's class does.
    """
    if published is None:
        published = name in models.list_models()
    with torch.device(device):
        if not published:
            return models.create(name, num_classes=num_classes or 10, in_channels=in_channels,
                                 image_size=size or 32), size or 32
        side = size or entry(name).image_size
        return models.create_model(name, num_classes=num_classes, in_channels=in_channels,
                                   **zoo.sized(name, side)), side
