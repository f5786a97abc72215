"""`fit`: run the stages of a recipe, so that an interruption at any moment changes nothing."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitkernels._arguments import function, integer, refuse
from bitkernels._files import locked
from bitkernels.models.preprocessing import metadata
from bitkernels.models.weights import save_pretrained
from bitkernels.train import checkpoint
from bitkernels.train.data import Batches, Data
from bitkernels.train.distributed import Group, synchronised
from bitkernels.train.errors import CheckpointError
from bitkernels.train.logs import CsvLog
from bitkernels.train.recipes import Recipe, Stage
from bitkernels.train.run import Options, Result, Run, Weights
from bitkernels.train.trainer import Trainer

__all__ = ["fit"]


def fit(build: Callable[[], nn.Module], recipe: Recipe, data: Data,
        out: str | Path | None = None, *, options: Options | None = None, seed: int = 0,
        teacher: nn.Module | None = None, initial: Weights | None = None, resume: bool = False,
        name: str = "model", group: Group | None = None) -> Result:
    """Train a network by a recipe.

        result = fit(lambda: models.create("reactnet", in_channels=1, image_size=8),
                     recipes.get("adambnn-digits"), datasets.digits())

    build: makes the network, with binary weights and activations; called once or twice a stage.
      Layers are made real where a stage wants that.
    out: folder for checkpoint.pt, metrics.csv, a .safetensors file for each stage, and the files
      of TensorBoard; made if it is not there. None writes nothing. At the end it is also what
      `models.save_pretrained` writes, of a network of `bitkernels.models`: `from_pretrained` makes
      the network again, and its `pretrained_config` says what its pictures go through.
    seed: of weights, order and augmentation. On a CPU the same seed gives the same bits, also when
      the run was killed and resumed, with any number of workers.
    teacher: where a stage has teacher="given"; used in evaluation mode.
    initial: the first stage's weights, all of them. Default: those that `build` makes.
    resume: go on from out/checkpoint.pt, which must be of the same model, recipe, data, seed and
      given teacher.
    name: of the model, for checkpoints and messages.
    group: the processes to train in, `Group.join()` under torchrun.

    Raises ValueError for arguments that do not fit, and the errors of `bitkernels.train.errors`:
    the last checkpoint then is as it was. A folder that another run is writing to is refused.
    """
    options, group = Options() if options is None else options, group or Group()
    if not isinstance(options, Options):
        refuse("fit", "options", "an Options", options)
    if not isinstance(recipe, Recipe):
        refuse("fit", "recipe", "a Recipe, as recipes.get(name) gives", recipe)
    if not isinstance(data, Data):
        refuse("fit", "data", "a Data, as bitkernels.train.datasets makes", data)
    function("fit", "build", build)
    seed = integer("fit", "seed", seed, 0, 2**32 - 1)
    if resume and out is None:
        raise ValueError("resume needs the folder of the run, out")
    if any(stage.teacher == "given" for stage in recipe.stages) and teacher is None:
        raise ValueError(f"recipe {recipe.name} learns from a teacher that is given, and none is")
    if out is not None:
        checkpoint.safetensors()
    data.check()
    for stage in recipe.stages:  # refused before anything is written or trained
        Batches(len(data.train), stage.batch_size, seed, group.rank, group.size)
        data.augmentation(stage.augmentation)
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", group.local_rank)
        torch.cuda.set_device(device)
    given = {}
    if out is not None and any(stage.teacher == "given" for stage in recipe.stages):
        assert teacher is not None
        given["teacher"] = checkpoint.fingerprint(teacher)
    run = Run(build, recipe, data, Path(out) if out is not None and group.first else None, options,
               seed, group, device, {
                   "model": name, "recipe": recipe.settings(), "data": data.name,
                   "images": [len(data.train), len(data.held_out)], "seed": seed,
                   "processes": group.size, "bf16": options.bf16,
                   "channels_last": options.channels_last, "compile": options.compile,
                   "watch": options.watch, "tensorboard": options.tensorboard,
                   "initial weights": initial is not None, **given}, teacher)
    with ExitStack() as held:
        return _fit(run, initial, _opened(run, resume, held))


def _fit(run: Run, initial: Weights | None, saved: dict[str, Any] | None) -> Result:
    recipe, group = run.recipe, run.group
    model: nn.Module | None = None
    for index, stage in enumerate(recipe.stages):
        if saved is not None and index < saved["stage"] and index < len(recipe.stages) - 1:
            run.finished[stage.name] = group.shared(
                checkpoint.import_weights(_weights_path(run, stage)) if group.first else None)
            continue
        model = _stage(run, index, initial if index == 0 else None,
                       saved if saved is not None and saved["stage"] == index else None)
    assert model is not None
    _save_network(run, model)
    return Result(model.eval(), run.rows)


def _save_network(run: Run, model: nn.Module) -> None:
    """What `from_pretrained` reads, for a network of this package that the last stage left binary;
    a warning where it was changed since it was made."""
    made, stage = getattr(model, "pretrained_config", None), run.recipe.stages[-1]
    if made is None or (stage.activations, stage.weights) != ("binary", "binary"):
        return
    rule, labels = run.data.preprocessing, run.data.labels
    if rule is not None:
        made["preprocessing"] = {"name": rule.name, "size": rule.size}
    if labels is not None:
        made["labels"] = list(labels)
    if run.out is None:
        return
    try:
        save_pretrained(model, run.out)
    except ValueError as error:
        warnings.warn(f"fit: {run.out} is no folder for from_pretrained: {error}", stacklevel=4)
    except OSError as error:
        raise CheckpointError(f"cannot write to {run.out}: {error.strerror}") from None


def _opened(run: Run, resume: bool, held: ExitStack) -> dict[str, Any] | None:
    """The folder made ready by the first rank; the checkpoint to resume, on all of them.

    Raises the first rank's CheckpointError on all of them.
    """
    found: dict[str, Any] | CheckpointError | None = None
    if run.out is not None:
        try:
            found = _open(run.out, run.identity, resume, held)
            run.csv = CsvLog(run.out / "metrics.csv", found["rows"] if found else [])
        except CheckpointError as error:
            found = error
    saved = run.group.shared(found)
    if isinstance(saved, CheckpointError):
        raise saved
    run.rows = list(saved["rows"]) if saved else []
    return saved


def _open(out: Path, identity: dict[str, Any], resume: bool,
          held: ExitStack) -> dict[str, Any] | None:
    path = out / "checkpoint.pt"
    try:
        if not resume:
            out.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            held.enter_context(locked(out))
    except BlockingIOError:
        raise CheckpointError(f"another run is writing to {out}: choose another folder") from None
    except OSError as error:
        verb = "write to" if out.is_dir() else "make"
        raise CheckpointError(f"cannot {verb} {out}: {error.strerror}") from None
    if resume:
        return checkpoint.load(path, identity)
    if path.exists():
        raise CheckpointError(f"{path} is there already: resume it, or choose another folder "
                              "(--resume, --out)")
    return None


def _weights_path(run: Run, stage: Stage) -> Path:
    assert run.out is not None
    return run.out / f"{stage.name}.safetensors"


def _stage(run: Run, index: int, initial: Weights | None,
           saved: dict[str, Any] | None) -> nn.Module:
    """Run one stage from its start or from a checkpoint; return its network."""
    stage = run.recipe.stages[index]
    _seed_all(run.seed * 1000 + index)
    model = run.network(stage)
    if stage.start is not None:
        checkpoint.transfer(run.finished[stage.start], model, f"stage {stage.start}")
    elif initial is not None:
        checkpoint.transfer(initial, model, "the given file")
    model = synchronised(model, run.group, run.device)
    with ExitStack() as stack:
        trainer = Trainer(run, index, model, stack)
        if saved is not None:
            trainer.load(saved)
        else:
            torch.manual_seed(run.seed * 1000 + index + run.group.rank * 1_000_003)  # of dropout
        trainer.train()
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    run.finished[stage.name] = weights
    if run.out is not None:
        checkpoint.export(_weights_path(run, stage), weights, {
            "model": run.identity["model"], "recipe": run.recipe.name, "stage": stage.name,
            "data": run.data.name, **metadata(run.data.preprocessing)})
    return model


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if (np := checkpoint.numpy()) is not None:
        np.random.seed(seed % 2**32)
