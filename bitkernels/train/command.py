"""`python -m bitkernels train`: its arguments, and what they mean."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitkernels import models
from bitkernels.backends import cpu
from bitkernels.train import checkpoint, datasets, recipes
from bitkernels.train.data import Batches, Data
from bitkernels.train.distributed import Group
from bitkernels.train.errors import CheckpointError, DivergedError, TrainError, first_line
from bitkernels.train.loop import fit
from bitkernels.train.recipes import AUGMENTATIONS, Recipe
from bitkernels.train.run import Options

DESCRIPTION = """\
Train a binary network by a recipe.

  python -m bitkernels train --recipe quicknet-digits --data digits --out run --threads 1
  python -m bitkernels train --recipe quicknet-digits --show
  python -m bitkernels train --model reactnet --data digits --recipe adambnn-digits --out run
  python -m bitkernels train --recipe bop-cifar10 --data cifar10 --root ~/cifar --out run
  torchrun --nproc-per-node 8 -m bitkernels train --recipe reactnet-18 --data imagenet \\
      --root /imagenet --bf16 --channels-last --workers 8 --out run \\
      --teacher torchvision.models:resnet34 --teacher-weights resnet34.safetensors

--out has the checkpoint, metrics.csv, and the weights after each stage as safetensors. A run that
was interrupted goes on with the same command and --resume.

Besides torch this needs safetensors; tqdm, unless --quiet; scikit-learn for the digits; torchvision
for pictures and CIFAR; tensorboard for --tensorboard.
"""

# Import name: what to install, and for which part of a run.
PACKAGES = {"safetensors": ("safetensors", "writes the weights"),
            "tqdm": ("tqdm", "draws progress bars; --quiet does without"),
            "tensorboard": ("tensorboard", "draws the plots of --tensorboard"),
            "sklearn": ("scikit-learn", "has the digits")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", help="a name of bitkernels.models.names() or list_models(), the "
                                      "first where both have it, or module:function; default: the "
                                      "one that the recipe is for")
    what.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE",
                      help="an argument of the model, beside the recipe's for its own model; may "
                      "be given several times")
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
    how.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    how.add_argument("--device", help="cpu, cuda or cuda:INDEX; default: a GPU if there is one")
    how.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    how.add_argument("--workers", type=int, default=0, help="processes that load images")
    how.add_argument("--bf16", action="store_true", help="mixed precision")
    how.add_argument("--channels-last", action="store_true", help="memory format")
    how.add_argument("--compile", action="store_true",
                     help="torch.compile; on one GPU with CUDA graphs")
    how.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS",
                     help="besides the checkpoint after each epoch")
    how.add_argument("--tensorboard", action="store_true", help="plots in --out/tensorboard")
    how.add_argument("--no-watch", action="store_true", help="no metrics of the binary weights")
    how.add_argument("--quiet", action="store_true", help="no progress bars")


def main(args: argparse.Namespace) -> int:
    """Run the command; the exit status. Errors that the user can mend are one line on stderr."""
    group = Group()
    try:
        _check_numbers(args)
        recipe = _recipe(args)
        if args.show:
            print(recipe)
            return 0
        if recipe.model and args.model in (None, recipe.model):
            args.model = recipe.model
            args.model_option = [*recipe.model_options, *args.model_option]
        networks = dict.fromkeys([*models.names(), *models.list_models()])
        for name, known in (("model", networks), ("data", datasets.NAMES), ("out", ())):
            if getattr(args, name) is None:
                raise ValueError(f"--{name} is needed" + (
                    f"; there are {', '.join(known)}" if known else ""))
        _check_files(args, recipe)
        args.device = _device(args.device)
        _check_packages(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        group = Group.join(args.device)
        _run(args, recipe, group)
        return 0
    except (CheckpointError, DivergedError) as error:  # all processes meet it, or the first alone
        return _failed(error, group.first)
    except (TrainError, ValueError, OSError) as error:  # OSError: the writer of TensorBoard
        return _failed(error)
    except torch.OutOfMemoryError as error:
        return _failed(ValueError(f"--batch-size is too large for the memory of {args.device}: "
                                  f"{first_line(error)}"))
    except KeyboardInterrupt:
        if group.first:
            kept = args.out and (Path(args.out) / "checkpoint.pt").exists()
            print("\ninterrupted" + ("; --resume goes on from the last checkpoint" if kept else ""),
                  file=sys.stderr)
        return 130
    finally:
        group.close()


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Puts the option before the message of an error that the user can mend."""
    try:
        yield
    except (TrainError, ValueError) as error:
        raise type(error)(f"{option}: {error}") from None


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1), ("threads", 1), ("size", 1),
                        ("checkpoint_every", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.threads is not None and args.threads > cpu.MOST_THREADS:
        raise ValueError(f"--threads must be at most {cpu.MOST_THREADS}, got {args.threads}")
    for name in ("lr", "gamma"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0 and finite, got {value}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")


def _check_files(args: argparse.Namespace, recipe: Recipe) -> None:
    """What is missing, before anything is read or made."""
    out = Path(args.out)
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out must be a folder, and {path} is a file")
    if args.resume and not (out / "checkpoint.pt").exists():
        raise ValueError(f"--resume: there is no checkpoint {out / 'checkpoint.pt'} to resume")
    if args.root is not None and args.data not in ("digits", "generated") \
            and not Path(args.root).is_dir():
        raise ValueError(f"--root must be the folder of the files of {args.data}, and there is no "
                         f"folder {args.root}")
    if (args.teacher is None) != (args.teacher_weights is None):
        given, other = (("--teacher", "--teacher-weights") if args.teacher
                        else ("--teacher-weights", "--teacher"))
        raise ValueError(f"{given} needs {other}")
    taught = [stage.name for stage in recipe.stages if stage.teacher == "given"]
    if taught and args.teacher is None:
        raise ValueError(f"--teacher and --teacher-weights are needed: recipe {recipe.name} learns "
                         f"from a trained network in {' and '.join(taught)}")
    if args.teacher is not None and not taught:
        raise ValueError(f"--teacher: recipe {recipe.name} learns from no network that is given")


def _check_packages(args: argparse.Namespace) -> None:
    wanted = {"safetensors": True, "tqdm": not args.quiet, "tensorboard": args.tensorboard,
              "sklearn": args.data == "digits"}
    missing = [PACKAGES[module] for module, needed in wanted.items()
               if needed and importlib.util.find_spec(module) is None]
    if missing:
        reasons = ", ".join(f"{name} ({why})" for name, why in missing)
        raise TrainError(f"this run needs what is not installed: {reasons}: pip install "
                         f"{' '.join(name for name, _ in missing)}")


def _device(name: str | None) -> str:
    """The device of this run, which is there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:INDEX, got {name!r}") from None
    if device.type == "cpu":
        return name
    here = torch.accelerator.current_accelerator()
    there_are = torch.accelerator.device_count()
    if here is None or here.type != device.type:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device here, "
                         f"only {f'cpu and {here.type}' if here else 'cpu'}")
    if device.index is not None and device.index >= there_are:
        raise ValueError(f"--device {name}: there are {there_are} of them, counted from 0")
    return name


def _failed(error: Exception, show: bool = True) -> int:
    if show:
        print(f"bitkernels train: {error}", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace, recipe: Recipe, group: Group) -> None:
    data = datasets.load(args.data, args.root, args.size)
    for stage in recipe.stages:
        with _naming("--batch-size"):
            Batches(len(data.train), stage.batch_size, args.seed, group.rank, group.size)
        with _naming("--augmentation"):
            data.augmentation(stage.augmentation)
    build = builder(args.model, data, args.model_option)
    _try(build, data, args)
    initial = None
    if args.init:
        with _naming("--init"):
            initial = checkpoint.import_weights(Path(args.init))
    result = fit(
        build, recipe, data, args.out, seed=args.seed, resume=args.resume, group=group,
        name=" ".join([args.model, *args.model_option]), teacher=_teacher(args, data),
        initial=initial,
        options=Options(
            device=args.device, bf16=args.bf16, channels_last=args.channels_last,
            compile=args.compile, workers=args.workers, checkpoint_every=args.checkpoint_every,
            watch=not args.no_watch, tensorboard=args.tensorboard, progress=not args.quiet))
    if group.first:
        print(f"{result.accuracy:.2%} of {len(data.held_out)} held-out images; weights in "
              f"{Path(args.out) / recipe.stages[-1].name}.safetensors")


def _try(build: Callable[[], nn.Module], data: Data, args: argparse.Namespace) -> None:
    """Make the network once and show it an image, so that what does not fit is found at the start.

    Raises ValueError that names --model.
    """
    what = " ".join([f"--model {args.model}",
                     *(f"--model-option {option!r}" for option in args.model_option)])
    model = _made(build, what).eval()
    images = torch.zeros(1, data.channels, data.size, data.size)
    shape = f"{data.channels}x{data.size}x{data.size}"
    try:
        with torch.no_grad():
            outputs = model(images)
    except Exception as error:
        raise ValueError(f"{what}: does not take images of {shape}: {first_line(error)}") from None
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, data.classes):
        got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(f"{what}: must give (N, {data.classes}) for N images of {shape}, got "
                         f"{got} for one")


def _made(build: Callable[[], nn.Module], what: str) -> nn.Module:
    try:
        return build()
    except Exception as error:  # the model may be any function
        raise ValueError(f"{what}: cannot be made: {first_line(error)}") from None


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None:
        raise ValueError(f"--recipe is needed; there are {', '.join(recipes.names())}")
    recipe = recipes.get(args.recipe).scaled(args.epochs, args.batch_size,
                                             augmentation=args.augmentation)
    with _naming("--lr"):
        recipe = recipe.scaled(lr=args.lr)
    with _naming("--gamma"):
        recipe = recipe.scaled(gamma=args.gamma)
    if args.stage is None:
        return recipe
    stages = {stage.name: stage for stage in recipe.stages}
    if args.stage not in stages:
        raise ValueError(f"--stage: recipe {recipe.name} has no stage {args.stage}, only "
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
    model = _made(builder(args.teacher, data, [], "--teacher"), f"--teacher {args.teacher}")
    with _naming("--teacher-weights"):
        checkpoint.transfer(checkpoint.import_weights(Path(args.teacher_weights)), model,
                            args.teacher_weights)
    return model


def builder(name: str, data: Data, options: list[str],
            flag: str = "--model") -> Callable[[], nn.Module]:
    """What makes the model for these images.

    name: for `bitkernels.models.create`, or module:function, which is called with num_classes.
    options: NAME=VALUE, the value a Python literal or else a string; the last of a name counts.
    flag: the option that the name was given by. Raises ValueError.
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
        return lambda: models.create(name, num_classes=data.classes, in_channels=data.channels,
                                     image_size=data.size, **given)
    sys.path.insert(0, os.getcwd())  # as python -m does; torchrun does not
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{flag} {name}: {error}") from None
    return lambda: make(num_classes=data.classes, **given)
