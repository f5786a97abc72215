"""`python -m bitkernels train`: its arguments, and what they mean."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitkernels.train import checkpoint, datasets, recipes
from bitkernels.train.data import Data
from bitkernels.train.distributed import Group
from bitkernels.train.errors import CheckpointError, DivergedError, TrainError
from bitkernels.train.loop import fit
from bitkernels.train.recipes import AUGMENTATIONS, Recipe
from bitkernels.train.run import Options

DESCRIPTION = """\
Train a binary network by a recipe.

  python -m bitkernels train --model reactnet --data digits --recipe adambnn-digits --out run
  torchrun --nproc-per-node 8 -m bitkernels train --model reactnet --data imagenet \\
      --root /imagenet --recipe adambnn \\
      --teacher torchvision.models:resnet34 --teacher-weights resnet34.safetensors

--out has the checkpoint, metrics.csv, and the weights after each stage as safetensors. A run that
was interrupted goes on with the same command and --resume.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", help="a name of bitkernels.models, or module:function")
    what.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE",
                      help="an argument of the model; may be given several times")
    what.add_argument("--data", choices=datasets.NAMES, help="the image set")
    what.add_argument("--root", help="the folder of its files")
    what.add_argument("--size", type=int, help="the side of an image, for folder and imagenet")
    what.add_argument("--recipe", choices=recipes.names(), help="how")
    what.add_argument("--show", action="store_true", help="print the recipe and stop")
    what.add_argument("--stage", help="run this stage alone; the weights that it starts from and "
                                      "its teacher are then given")
    what.add_argument("--init", metavar="FILE", help="safetensors with the first stage's weights")
    what.add_argument("--teacher", help="the model of a given teacher, as --model")
    what.add_argument("--teacher-weights", metavar="FILE", help="its weights, safetensors")
    scale = parser.add_argument_group("changes to the recipe")
    scale.add_argument("--epochs", type=int, help="of each stage")
    scale.add_argument("--batch-size", type=int, help="of all processes together")
    scale.add_argument("--lr", type=float, help="of the recipe's first Adam or SGD; the others "
                                                "keep their ratio to it")
    scale.add_argument("--gamma", type=float, help="of Bop, likewise")
    scale.add_argument("--augmentation", choices=AUGMENTATIONS,
                       help="of the training images; folders of pictures have them all")
    how = parser.add_argument_group("how to run")
    how.add_argument("--out", help="folder of the results")
    how.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    how.add_argument("--workers", type=int, default=0, help="processes that load images")
    how.add_argument("--bf16", action="store_true", help="mixed precision")
    how.add_argument("--channels-last", action="store_true", help="memory format")
    how.add_argument("--compile", action="store_true", help="torch.compile")
    how.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS",
                     help="besides the checkpoint after each epoch")
    how.add_argument("--tensorboard", action="store_true", help="plots in --out/tensorboard")
    how.add_argument("--no-watch", action="store_true", help="no metrics of the binary weights")
    how.add_argument("--quiet", action="store_true", help="no progress bars")


def main(args: argparse.Namespace) -> int:
    """Run the command; the exit status. Errors that the user can mend are one line on stderr."""
    group = Group()
    try:
        recipe = _recipe(args)
        if args.show:
            print(recipe)
            return 0
        for name in ("model", "data", "out"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name} is needed")
        if args.threads:
            torch.set_num_threads(args.threads)
        group = Group.join(args.device)
        _run(args, recipe, group)
        return 0
    except (CheckpointError, DivergedError) as error:  # all processes meet it, or the first alone
        return _failed(error, group.first)
    except (TrainError, ValueError, OSError) as error:  # OSError: the writer of TensorBoard
        return _failed(error)
    except KeyboardInterrupt:
        if group.first:
            kept = args.out and (Path(args.out) / "checkpoint.pt").exists()
            print("\ninterrupted" + ("; --resume goes on from the last checkpoint" if kept else ""),
                  file=sys.stderr)
        return 130
    finally:
        group.close()


def _failed(error: Exception, show: bool = True) -> int:
    if show:
        print(f"bitkernels train: {error}", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace, recipe: Recipe, group: Group) -> None:
    data = datasets.load(args.data, args.root, args.size)
    build = builder(args.model, data, args.model_option)
    result = fit(
        build, recipe, data, args.out, seed=args.seed, resume=args.resume, group=group,
        name=" ".join([args.model, *args.model_option]), teacher=_teacher(args, data),
        initial=checkpoint.import_weights(Path(args.init)) if args.init else None,
        options=Options(
            device=args.device, bf16=args.bf16, channels_last=args.channels_last,
            compile=args.compile, workers=args.workers, checkpoint_every=args.checkpoint_every,
            watch=not args.no_watch, tensorboard=args.tensorboard, progress=not args.quiet))
    if group.first:
        print(f"{result.accuracy:.2%} of {len(data.held_out)} held-out images; weights in "
              f"{Path(args.out) / recipe.stages[-1].name}.safetensors")


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None:
        raise ValueError(f"--recipe is needed; there are {', '.join(recipes.names())}")
    recipe = recipes.get(args.recipe).scaled(args.epochs, args.batch_size, args.lr, args.gamma,
                                              args.augmentation)
    if args.stage is None:
        return recipe
    stages = {stage.name: stage for stage in recipe.stages}
    if args.stage not in stages:
        raise ValueError(f"recipe {recipe.name} has no stage {args.stage}, only "
                         f"{', '.join(stages)}")
    stage = stages[args.stage]
    if stage.start is not None and args.init is None:
        raise ValueError(f"stage {stage.name} starts from the weights of {stage.start}: give them "
                         "with --init")
    return replace(recipe, stages=(replace(stage, start=None,
                                           teacher=stage.teacher and "given"),))


def _teacher(args: argparse.Namespace, data: Data) -> nn.Module | None:
    if args.teacher is None:
        return None
    if args.teacher_weights is None:
        raise ValueError("--teacher needs --teacher-weights")
    model = builder(args.teacher, data, [])()
    checkpoint.transfer(checkpoint.import_weights(Path(args.teacher_weights)), model,
                        args.teacher_weights)
    return model


def builder(name: str, data: Data, options: list[str]) -> Callable[[], nn.Module]:
    """What makes the model for these images.

    name: of `bitkernels.models`, or module:function, which is called with num_classes.
    options: NAME=VALUE, the value a Python literal or else a string. Raises ValueError.
    """
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--model-option takes NAME=VALUE, got {option!r}")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    module, colon, function = name.partition(":")
    if not colon:
        from bitkernels import models

        return lambda: models.create(name, num_classes=data.classes, in_channels=data.channels,
                                     image_size=data.size, **given)
    sys.path.insert(0, os.getcwd())  # as python -m does; torchrun does not
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {name}: {error}") from None
    return lambda: make(num_classes=data.classes, **given)
