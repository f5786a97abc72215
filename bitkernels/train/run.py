"""What the parts of a run share: how it is computed, what it is of, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels._arguments import flag
from bitkernels.train import checkpoint
from bitkernels.train.arguments import check, text, whole
from bitkernels.train.data import Data
from bitkernels.train.distributed import Group
from bitkernels.train.logs import CsvLog
from bitkernels.train.recipes import Recipe, Stage
from bitkernels.train.stages import configure

__all__ = ["Options", "Result", "Run", "Weights"]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """How a run is computed and what it writes; what it computes is in the recipe.

    device: of torch; under several processes "cuda" is the GPU of the local rank.
    bf16: forward and loss under bfloat16 autocast; weights and updates stay float32.
    channels_last: the memory format of images and filters.
    compile: `torch.compile`; on one GPU with CUDA graphs (mode="reduce-overhead").
    workers: processes that load images, 0: this one.
    checkpoint_every: steps between checkpoints, besides the one after each epoch.
    watch: metrics of the binary weights each epoch (`bitkernels.metrics`), among them flip ratio.
    tensorboard: plots, and metrics and histograms of the activations too.
    progress: a bar on the terminal, elsewhere a line an epoch.

    Raises ValueError for numbers out of range.
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

    def __post_init__(self) -> None:
        check(self, device=text, workers=whole(0), checkpoint_every=whole(1), **dict.fromkeys(
            ("bf16", "channels_last", "compile", "watch", "tensorboard", "progress"), flag))


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
class Run:
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
