"""One stage under way: its steps, epochs, checkpoints."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels.metrics import Watcher, watch
from bitkernels.optim import binary_weights
from bitkernels.train import checkpoint
from bitkernels.train.data import Batches, Pictures, held_out_batches, loader
from bitkernels.train.errors import CheckpointError, DataError, DivergedError, TrainError
from bitkernels.train.logs import Bar, TensorBoard
from bitkernels.train.run import Run
from bitkernels.train.stages import StageLoss, make_optimizer, make_scheduler

__all__ = ["Trainer"]


class Trainer:
    """One stage under way: position, sums since the start of the epoch, and everything it holds."""

    def __init__(self, run: Run, index: int, model: nn.Module, stack: ExitStack) -> None:
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
            # Python needs longer for a step's launches than a GPU does for the step: there a CUDA
            # graph repeats them. DistributedDataParallel has launches of its own between them.
            graphs = run.device.type == "cuda" and run.group.size == 1
            self.net = torch.compile(  # type: ignore[assignment]
                self.net, mode="reduce-overhead" if graphs else None)
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
            if run.options.compile:  # what a graph has returned is not looked at any more
                torch.compiler.cudagraph_mark_step_begin()
            with self._autocast():
                logits = self._checked(self.net(images), labels)
                loss = self.loss(images, logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            if self.stage.gradient_clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.gradient_clip)
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

    def _checked(self, logits: Tensor, labels: Tensor) -> Tensor:
        data = self.run.data
        if logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < data.classes:
            raise TrainError(f"{type(self.model).__name__} must give ({len(labels)}, "
                             f"{data.classes}) for {len(labels)} images of {data.name}, got "
                             f"{tuple(logits.shape)}")
        return logits

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        data = self.run.data  # labels still on the CPU
        if labels.is_floating_point() or len(labels) and not (
                0 <= int(labels.min()) and int(labels.max()) < data.classes):
            raise DataError(f"labels of {data.name} must be integers from 0 to {data.classes - 1}, "
                            f"got {labels.min().item()} to {labels.max().item()}")
        kind = next(self.model.parameters()).dtype
        if images.dtype == torch.float64 != kind:  # as of NumPy; other networks cast them
            raise DataError(f"images of {data.name} must be {str(kind)[6:]} as the network's "
                            f"parameters, got {str(images.dtype)[6:]}")
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
                logits = self._checked(self.model(images), labels)
            sums += torch.stack([F.cross_entropy(logits.float(), labels, reduction="sum").double(),
                                 (logits.argmax(1) == labels).sum().double(),
                                 torch.tensor(len(labels), device=run.device).double()])
        loss, right, count = run.group.total(sums.tolist(), run.device)
        if not math.isfinite(loss):  # then a class is none of the largest outputs
            raise self._diverged(f"the loss on the held-out images is {loss}", self.total)
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
        """Take over what `save` wrote.

        Raises CheckpointError where the network had other parameters then, as ReActNet in 0.1: the
        optimizer's state goes by their order.
        """
        missing = [key for key in self.model.state_dict() if key not in saved["model"]]
        if missing:
            raise CheckpointError(
                f"the checkpoint is of a version of {type(self.model).__name__} with other "
                f"parameters (it has no {missing[0]}), so the optimizer cannot go on from it; "
                "bitkernels.models.load_weights reads its weights")
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
