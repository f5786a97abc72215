"""`python -m bitkernels predict`: what a network sees in pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bitkernels._packages import needs
from bitkernels.cli import zoo
from bitkernels.models.preprocessing import Preprocessing
from bitkernels.train.errors import DataError, TrainError, first_line

DESCRIPTION = """\
The most probable classes of pictures, preprocessed as those were that the network learned on.

  python -m bitkernels predict quicknet --weights quicknet_weights.h5 cat.jpg dog.jpg
  python -m bitkernels predict reactnet_a --weights model_best.pth.tar --top 1 --packed *.jpg
  python -m bitkernels predict quicknet --weights mine.safetensors --num-classes 3 \\
      --labels labels.txt picture.png
  python -m bitkernels predict run picture.png     --out of a training on pictures

A network of 1,000 classes has ImageNet's labels, one trained on a folder the names in it; --labels
is a file with one a line.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    zoo.add_network(parser)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files that PIL reads")
    parser.add_argument("--top", type=int, default=5, help="so many classes; default: 5")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line")


def main(options: argparse.Namespace) -> int:
    try:
        zoo.check(options, "top")
        asked = zoo.asked(options)
        classes = asked.classes
        names = asked.labels if asked.labels and options.labels is None else labels(
            options.labels, classes)
        for path in options.pictures:
            if not Path(path).is_file():
                raise DataError(f"there is no picture {path}")
        images = torch.stack([read(path, asked.rule) for path in options.pictures])
        found = predict(zoo.network(options), images.to(options.device), min(options.top, classes))
    except zoo.MENDABLE as error:
        print(f"bitkernels predict: {first_line(error)}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([{"picture": path, "classes": [
            {"index": index, "label": names[index], "probability": share}
            for index, share in best]}
            for path, best in zip(options.pictures, found, strict=True)]))
        return 0
    for path, best in zip(options.pictures, found, strict=True):
        print(path)
        for index, share in best:
            print(f"  {100 * share:5.1f} %  {names[index]}")
    return 0


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor,
            top: int) -> list[list[tuple[int, float]]]:
    """For each image (N, 3, H, W) the `top` classes with their softmax, the most probable first.

    One image after the other, so that many of them take no more memory than one. Raises ValueError
    for a model that gives NaN or infinity, of which there is no softmax.
    """
    found = []
    for image in images:
        shares = zoo.ordered(model(image[None])[0].float().softmax(0))
        best = shares.topk(top)
        found.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    return found


def read(path: str, rule: Preprocessing) -> torch.Tensor:
    """A picture as the network's input. Raises DataError for a file that is none."""
    transform = rule.transform()
    try:
        from PIL import Image
    except ImportError as error:
        raise TrainError(needs("pictures", "pillow", error)) from None
    try:
        with Image.open(path) as picture:
            return transform(picture)
    except Exception as error:  # each format raises its own
        raise DataError(f"cannot read {path}: {first_line(error)}") from None


def labels(path: str | None, classes: int) -> Sequence[str]:
    """The names of the classes: of a file, ImageNet's for 1,000, else their numbers.

    Raises ValueError where the file cannot be read or does not have one for each class.
    """
    if path is not None:
        try:  # utf-8-sig drops the mark that some editors put first
            names = Path(path).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--labels: cannot read {path}: {first_line(error)}") from None
        while names and not names[-1].strip():
            names.pop()
        if len(names) != classes:
            raise ValueError(f"--labels must have a line for each of {classes} classes, and {path} "
                             f"has {len(names)}")
        return names
    if classes != 1000:
        return [str(index) for index in range(classes)]
    try:
        from torchvision.models import ResNet18_Weights
    except Exception as error:  # one built for another torch raises RuntimeError
        raise TrainError(needs("ImageNet's labels (or --labels)", "torchvision", error)) from None
    return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
