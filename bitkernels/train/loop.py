"""`fit`: run the stages of a recipe, so that an interruption at any moment changes nothing."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels.metrics import Watcher, watch
from bitkernels.optim.grouping import binary_weights
from bitkernels.train import checkpoint
from bitkernels.train.data import Batches, Data, Pictures, held_out_batches, loader
from bitkernels.train.distributed import Group, synchronised
from bitkernels.train.errors import CheckpointError, DivergedError
from bitkernels.train.logs import Bar, CsvLog, TensorBoard
from bitkernels.train.recipes import Recipe, Stage
from bitkernels.train.stages import StageLoss, configure, make_optimizer, make_scheduler

__all__ = ["Options", "Result", "fit"]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """How a run is computed and what it writes; what it computes is in the recipe.

    device: of torch; under several processes "cuda" is the GPU of the local rank.
    bf16: forward and loss under bfloat16 autocast; weights and updates stay float32.
    channels_last, compile: the memory format of images and filters; `torch.compile`.
    workers: processes that load images, 0: this one.
    checkpoint_every: steps between checkpoints, besides the one after each epoch.
    watch: metrics of the binary weights each epoch (`bitkernels.metrics`), among them flip ratio.
    tensorboard: plots, and metrics and histograms of the activations too.
    progress: a bar on the terminal, elsewhere a line an epoch.
    """

    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    workers: int = 0
    checkpoint_every: int = 1000
    watch: bool = True
    tensorboard: bool = False
    progress: bool = False


@dataclass(frozen=True)
class Result:
    """The network after the last stage, in evaluation mode, and one row an epoch (`COLUMNS`)."""

    model: nn.Module
    rows: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """On the held-out images after the last epoch, in [0, 1]."""
        return self.rows[-1]["held_out_accuracy"]


@dataclass
class _Run:
    """What all stages share."""

    build: Callable[[], nn.Module]
    recipe: Recipe
    data: Data
    out: Path | None  # None on all ranks but the first
    options: Options
    seed: int
    group: Group
    device: torch.device
    identity: dict[str, Any]
    given: nn.Module | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Weights] = field(default_factory=dict)
    csv: CsvLog | None = None

    def network(self, stage: Stage) -> nn.Module:
        """A fresh one on the device, with the stage's quantizers."""
        model = self.build()
        configure(model, stage)
        model = model.to(self.device)
        if self.options.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def teacher(self, stage: Stage) -> nn.Module | None:
        if stage.teacher is None:
            return None
        teacher = self.given
        if stage.teacher != "given":
            teacher = self.network(next(s for s in self.recipe.stages if s.name == stage.teacher))
            checkpoint.transfer(self.finished[stage.teacher], teacher, f"stage {stage.teacher}")
        assert teacher is not None
        return teacher.to(self.device).eval().requires_grad_(False)


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
      of TensorBoard; made if it is not there. None writes nothing.
    seed: of weights, order and augmentation. On a CPU the same seed gives the same bits, also when
      the run was killed and resumed, with any number of workers.
    teacher: where a stage has teacher="given"; used in evaluation mode.
    initial: the first stage's weights, all of them. Default: those that `build` makes.
    resume: go on from out/checkpoint.pt, which must be of the same model, recipe, data and seed.
    name: of the model, for checkpoints and messages.
    group: the processes to train in, `Group.join()` under torchrun.

    Raises ValueError for arguments that do not fit, and the errors of `bitkernels.train.errors`:
    the last checkpoint then is as it was.
    """
    options, group = options or Options(), group or Group()
    if resume and out is None:
        raise ValueError("resume needs the folder of the run, out")
    if any(stage.teacher == "given" for stage in recipe.stages) and teacher is None:
        raise ValueError(f"recipe {recipe.name} learns from a teacher that is given, and none is")
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", group.local_rank)
        torch.cuda.set_device(device)
    run = _Run(build, recipe, data, Path(out) if out is not None and group.first else None, options,
               seed, group, device, {
                   "model": name, "recipe": recipe.settings(), "data": data.name,
                   "images": [len(data.train), len(data.held_out)], "seed": seed,
                   "processes": group.size, "bf16": options.bf16,
                   "channels_last": options.channels_last, "compile": options.compile,
                   "initial weights": initial is not None}, teacher)
    saved = _opened(run, resume)
    model: nn.Module | None = None
    for index, stage in enumerate(recipe.stages):
        if saved is not None and index < saved["stage"] and index < len(recipe.stages) - 1:
            run.finished[stage.name] = group.shared(
                checkpoint.import_weights(_weights_path(run, stage)) if group.first else None)
            continue
        model = _stage(run, index, initial if index == 0 else None,
                       saved if saved is not None and saved["stage"] == index else None)
    assert model is not None
    return Result(model.eval(), run.rows)


def _opened(run: _Run, resume: bool) -> dict[str, Any] | None:
    """The folder made ready by the first rank; the checkpoint to resume, on all of them."""
    saved = None
    if run.out is not None:
        path = run.out / "checkpoint.pt"
        if resume:
            saved = checkpoint.load(path, run.identity)
        elif path.exists():
            raise CheckpointError(f"{path} is there already: resume it, or choose another folder")
        else:
            try:
                run.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"cannot make {run.out}: {error.strerror}") from None
        run.csv = CsvLog(run.out / "metrics.csv", saved["rows"] if saved else [])
    saved = run.group.shared(saved)
    run.rows = list(saved["rows"]) if saved else []
    return saved


def _weights_path(run: _Run, stage: Stage) -> Path:
    assert run.out is not None
    return run.out / f"{stage.name}.safetensors"


def _stage(run: _Run, index: int, initial: Weights | None,
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
        trainer = _Trainer(run, index, model, stack)
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
            "data": run.data.name})
    return model


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class _Trainer:
    """One stage under way: position, sums since the start of the epoch, and everything it holds."""

    def __init__(self, run: _Run, index: int, model: nn.Module, stack: ExitStack) -> None:
        self.run, self.index, self.model = run, index, model
        self.stage = stage = run.recipe.stages[index]
        options = run.options
        self.batches = Batches(len(run.data.train), stage.batch_size, run.seed, run.group.rank,
                               run.group.size)
        self.pictures = Pictures(run.data.train, run.data.augmentation(stage.augmentation),
                                 run.seed)
        self.optimizer = make_optimizer(model, stage)
        self.scheduler = make_scheduler(self.optimizer, stage, self.batches.steps)
        self.loss = StageLoss(stage.loss, model, run.teacher(stage))
        stack.callback(self.loss.close)
        self.watcher: Watcher | None = None
        if options.watch and binary_weights(model):
            self.watcher = watch(model, self.optimizer, activations=options.tensorboard,
                                 histograms=options.tensorboard)
            stack.callback(self.watcher.close)
        self.net = run.group.wrap(model, run.device)
        if options.compile:
            self.net = torch.compile(self.net)  # type: ignore[assignment]
        self.epoch = self.step = 0  # step: within the epoch
        self.sums = [0.0, 0.0, 0.0]  # loss, right answers, images of this epoch
        self.pending: list[Tensor] = []
        self.stack = stack
        self.bar: Bar | None = None
        self.board: TensorBoard | None = None

    @property
    def total(self) -> int:
        """Steps of this stage so far."""
        return self.epoch * self.batches.steps + self.step

    def train(self) -> None:
        run, options = self.run, self.run.options
        if options.progress and run.group.first:
            self.bar = Bar(self.stage.name, self.stage.epochs * self.batches.steps, self.total)
            self.stack.callback(self.bar.close)
        if options.tensorboard and run.out is not None:
            self.board = TensorBoard(run.out / "tensorboard" / self.stage.name, self.total)
            self.stack.callback(self.board.close)
        while self.epoch < self.stage.epochs:
            started = time.perf_counter()
            self._epoch()
            self._end_epoch(started)

    def _epoch(self) -> None:
        run = self.run
        self.model.train()
        self.batches.epoch, self.batches.start = self.epoch, self.step
        for images, labels in loader(self.pictures, self.batches, run.options.workers,
                                     run.device.type == "cuda"):
            images, labels = self._moved(images, labels)
            with self._autocast():
                logits = self.net(images)
                loss = self.loss(images, logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            with torch.no_grad():
                right = (logits.argmax(1) == labels).sum()
                self.pending.append(torch.stack([loss.detach().double() * len(labels), right]))
            if run.device.type == "cpu" or len(self.pending) == 50:  # reading waits for a GPU
                self._read()
            self.scheduler.step()
            if self.total % run.options.checkpoint_every == 0:
                self.save()

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = (torch.channels_last if self.run.options.channels_last
                  else torch.preserve_format)
        return (images.to(self.run.device, non_blocking=True, memory_format=layout),
                labels.to(self.run.device, non_blocking=True))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.run.device.type, torch.bfloat16,
                              enabled=self.run.options.bf16)

    def _read(self) -> None:
        """Take the losses of the last steps into the sums. Raises DivergedError."""
        if not self.pending:
            return
        share = self.stage.batch_size // self.run.group.size
        values = torch.stack(self.pending).tolist()
        self.pending.clear()
        loss, right = (sum(column) for column in zip(*values, strict=True))
        bad = [i for i, (value, _) in enumerate(values) if not math.isfinite(value)]
        sums = self.run.group.total([loss, right, float(share * len(values))], self.run.device)
        if not math.isfinite(sums[0]):  # on all processes, of which one may have no bad value
            step = self.total - len(values) + 1 + (bad[0] if bad else 0)
            raise self._diverged(f"the loss is {sums[0] / sums[2]}", step)
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        if self.bar is not None:
            self.bar.step(self.sums[0] / self.sums[2], self.sums[1] / self.sums[2],
                          _flips(self.watcher), len(values))

    def _diverged(self, what: str, step: int) -> DivergedError:
        rates = " and ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
        kept = self.run.out is not None and (self.run.out / "checkpoint.pt").exists()
        return DivergedError(
            f"training diverged: {what} at step {step} of stage {self.stage.name}, with lr {rates}"
            + ("; the last checkpoint is from before that" if kept else ""))

    def _end_epoch(self, started: float) -> None:
        self._read()
        run, stage = self.run, self.stage
        held_out_loss, held_out_accuracy = self._evaluate()
        found = self.watcher.scalars() if self.watcher is not None else {}
        row = {"stage": stage.name, "epoch": self.epoch + 1, "step": self.total,
               "lr": self._rate(self.total - 1), "train_loss": self.sums[0] / self.sums[2],
               "train_accuracy": self.sums[1] / self.sums[2], "held_out_loss": held_out_loss,
               "held_out_accuracy": held_out_accuracy,
               "flip_ratio": found.get("flip_ratio_mean", ""),
               **{key: found.get(key, "") for key in ("c2i_ratio", "dead_weights", "saturation")},
               "seconds": round(time.perf_counter() - started, 3)}
        run.rows.append(row)
        if run.csv is not None:
            run.csv.add(row)
        if self.board is not None:
            self.board.add(row, self.watcher)
        if self.bar is not None:
            self.bar.epoch(row, stage.epochs)
        if self.watcher is not None:
            self.watcher.reset()
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.save()

    def _rate(self, step: int) -> float:
        """The first group's learning rate at a step."""
        method = self.stage.method
        return method.lr * method.schedule.at(step, self.batches.steps, self.stage.epochs)

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Cross-entropy and accuracy on the held-out images, of all processes together."""
        run = self.run
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=run.device)
        batches = held_out_batches(len(run.data.held_out), self.stage.batch_size, run.group.rank,
                                   run.group.size)
        for images, labels in loader(Pictures(run.data.held_out, run.data.plain), batches,
                                     run.options.workers, run.device.type == "cuda"):
            images, labels = self._moved(images, labels)
            with self._autocast():
                logits = self.model(images)
            sums += torch.stack([F.cross_entropy(logits.float(), labels, reduction="sum").double(),
                                 (logits.argmax(1) == labels).sum().double(),
                                 torch.tensor(len(labels), device=run.device).double()])
        loss, right, count = run.group.total(sums.tolist(), run.device)
        return loss / count, right / count

    def save(self) -> None:
        """Write the checkpoint. Raises DivergedError where a weight is not finite."""
        self._read()
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self._diverged("a weight is no finite number", self.total)
        states = self.run.group.gather(checkpoint.random_state(self.run.device))
        if self.run.out is None:
            return
        checkpoint.save(self.run.out / "checkpoint.pt", {
            "identity": self.run.identity, "stage": self.index, "epoch": self.epoch,
            "step": self.step, "sums": self.sums, "rows": self.run.rows, "random": states,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "watcher": self.watcher.state_dict() if self.watcher is not None else None})

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `save` wrote."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.watcher is not None and saved["watcher"] is not None:
            self.watcher.load_state_dict(saved["watcher"])
        self.epoch, self.step, self.sums = saved["epoch"], saved["step"], list(saved["sums"])
        checkpoint.set_random_state(saved["random"][self.run.group.rank], self.run.device)


def _flips(watcher: Watcher | None) -> float | None:
    """The share of all binary weights that the last update flipped."""
    if watcher is None:
        return None
    ratios: list[Any] = [metrics["flip_ratio"] for metrics in watcher.weights.values()]
    return sum(r.last * r.size for r in ratios) / sum(r.size for r in ratios)
