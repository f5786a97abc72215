"""`python -m bitkernels evaluate`: the accuracy of a network's weights on a set of images."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from typing import Any

import torch

from bitkernels._packages import needs
from bitkernels.cli import zoo
from bitkernels.train import datasets
from bitkernels.train.data import Pictures, loader
from bitkernels.train.errors import DataError, TrainError, first_line

DESCRIPTION = """\
Top-1 and top-5 accuracy on held-out images, preprocessed as those were that the network learned on.

  python -m bitkernels evaluate quicknet --weights quicknet_weights.h5 --data imagenet --root /data
  python -m bitkernels evaluate reactnet_a --weights model_best.pth.tar --data imagenet \\
      --root /data --packed --limit 5000 --workers 4
  python -m bitkernels evaluate run --data folder --root pictures     --out of a training

imagenet and folder are pictures in ROOT/val/CLASS/; the classes count in the order of their names.
--limit takes so many images, spread evenly over the set.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    zoo.add_network(parser)
    parser.add_argument("--data", choices=datasets.HELD_OUT, default="imagenet",
                        help="the image set; default: imagenet")
    parser.add_argument("--root", required=True, help="the folder of its files")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--limit", type=int, metavar="N", help="of the images; default: all")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main(options: argparse.Namespace) -> int:
    try:
        zoo.check(options, "batch_size", "limit")
        if options.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {options.workers}")
        asked = zoo.asked(options)
        if not options.quiet and importlib.util.find_spec("tqdm") is None:
            raise TrainError(needs("progress bars (or --quiet)", "tqdm"))
        source, labels = datasets.held_out(options.data, options.root)
        if len(labels) != asked.classes:
            hint = ": --num-classes says how many it has" if asked.published else ""
            raise DataError(f"{options.data} in {options.root} has {len(labels)} classes and "
                            f"{options.model} {asked.classes}{hint}")
        if asked.labels is not None and list(asked.labels) != list(labels):
            other = sorted({*asked.labels} ^ {*labels})[:5]
            raise DataError(f"{options.data} in {options.root} does not have the classes that "
                            f"{options.model} learned: only one of them has {', '.join(other)}")
        pictures = Pictures(source, asked.rule.transform())
        model = zoo.network(options)
        start = time.perf_counter()
        right, count = evaluate(model, pictures, options.batch_size, limit=options.limit,
                                workers=options.workers, device=options.device,
                                progress=not options.quiet)
    except zoo.MENDABLE as error:
        print(f"bitkernels evaluate: {first_line(error)}", file=sys.stderr)
        return 1
    top1, top5 = (100 * right[k] / count for k in (1, 5))
    if options.json:
        print(json.dumps({"model": options.model, "weights": options.weights, "data": options.data,
                          "packed": options.packed, "images": count, "top1": top1, "top5": top5,
                          "seconds": time.perf_counter() - start}))
        return 0
    print(f"{options.model}{' packed' if options.packed else ''}: top-1 {top1:.2f} %, top-5 "
          f"{top5:.2f} % of {count:,} images")
    published = asked.published
    if published is not None and published.top1 is not None and options.data == "imagenet":
        second = "" if published.top5 is None else f", top-5 {published.top5} %"
        print(f"published: top-1 {published.top1} %{second}")
    return 0


@torch.no_grad()
def evaluate(model: torch.nn.Module, pictures: Pictures, batch_size: int, *,
             limit: int | None = None, workers: int = 0, device: str = "cpu",
             progress: bool = False) -> tuple[dict[int, int], int]:
    """({1: right at first, 5: right among the first five}, images).

    model: (N, 3, H, W) to (N, classes), in evaluation on `device`. limit: so many images, evenly
    spread. Raises DataError for a picture that cannot be read, ValueError for a model that gives
    NaN, which has no order.
    """
    count = len(pictures) if limit is None else min(limit, len(pictures))
    keys = [(0, i * len(pictures) // count) for i in range(count)]
    batches = [keys[i:i + batch_size] for i in range(0, count, batch_size)]
    right = {1: 0, 5: 0}
    images: Any = loader(pictures, batches, workers, device.startswith("cuda"))
    if progress:
        from tqdm import tqdm

        images = tqdm(images, total=len(batches), unit="batch", leave=False)
    for batch, labels in images:
        logits = zoo.ordered(model(batch.to(device)).float().cpu())
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.view(-1, 1)
        for k in right:
            right[k] += int(best[:, :k].any(1).sum())
    return right, count
