"""A stage made real: its quantizers, optimizer, schedule and loss."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from bitkernels.nn import BinaryLayer, RSign
from bitkernels.optim import Bop, CaseOptimizer, binary_weights, clip_latent_weights
from bitkernels.optim.grouping import binary_layers, check_slopes
from bitkernels.quantizers import NoOp
from bitkernels.train.distillation import (
    FeatureTap,
    attention_matching_loss,
    distribution_loss,
    output_matching_loss,
    soft_labels_loss,
)
from bitkernels.train.errors import TrainError
from bitkernels.train.recipes import Loss, Method, Schedule, Stage

__all__ = ["StageLoss", "configure", "make_optimizer", "make_scheduler", "matching_modules"]

NamedParameters = list[tuple[str, nn.Parameter]]


class ShiftedTanh(nn.Module):
    """tanh(x + shift), the real stand-in of `RSign`, with its parameter.

    Input (N, C, ...), shift (C,).
    """

    def __init__(self, sign: RSign) -> None:
        super().__init__()
        self.shift = sign.shift

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(input + self.shift.view(-1, *[1] * (input.dim() - 2)))


def configure(model: nn.Module, stage: Stage) -> None:
    """Make real what is real in this stage, in place; names and parameters stay.

    Real weights have no scale either. A sign of an activation becomes tanh; real inputs stay.
    Raises TrainError for a model without binary layers.
    """
    layers = binary_layers(model)
    if not layers:
        raise TrainError(f"{type(model).__name__} has no binary layers")
    for layer in layers.values():
        if stage.weights == "real":
            layer.weight_scale = None
            layer.weight_quantizer = NoOp(precision=32)
        if stage.activations == "tanh" and layer.input_quantizer is None:
            layer.input_quantizer = NoOp(precision=32)
        elif stage.activations == "tanh" and type(layer.input_quantizer) is not NoOp:
            layer.input_quantizer = nn.Tanh()
    if stage.activations == "tanh":
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, RSign):
                    setattr(parent, name, ShiftedTanh(child))


def make_optimizer(model: nn.Module, stage: Stage) -> Optimizer:
    """The stage's optimizer, over all parameters that require grad.

    Where there is a `rest`, `stage.method` has the weights of the binary layers, also in a stage
    that made them real. Raises TrainError where there is nothing for it, and ValueError for Bop on
    weights that get no gradient (`CaseOptimizer`).
    """
    binary = {id(layer.weight) for layer in model.modules() if isinstance(layer, BinaryLayer)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not any(stage.rest is None or id(p) in binary for _, p in named):
        what = "parameter" if stage.rest is None else "weight of a binary layer"
        raise TrainError(f"stage {stage.name}: no {what} of {type(model).__name__} requires grad")
    optimizer: Optimizer
    if stage.rest is None:
        optimizer = _made(stage.method, named)
    else:
        method, rest = stage.method, stage.rest
        optimizer = CaseOptimizer(
            named, (lambda _, p: id(p) in binary, lambda params: _made(method, params)),
            default=lambda params: _made(rest, params))
    for part in getattr(optimizer, "optimizers", (optimizer,)):
        if isinstance(part, Bop):
            check_slopes(part, model)
    if stage.signs_at_start:
        with torch.no_grad():
            for weight in binary_weights(model).values():
                weight.copy_(torch.where(weight < 0, -1.0, 1.0))
    if stage.latent_clip is not None:
        clip_latent_weights(optimizer, model, stage.latent_clip)
    return optimizer


def _made(method: Method, named: NamedParameters) -> Optimizer:
    if method.name == "bop":
        return Bop(named, gamma=method.lr, threshold=method.threshold)
    def decays(parameter: nn.Parameter) -> bool:
        return method.decay == "all" or (parameter.dim() == 4) == (method.decay == "filters")

    decayed = [pair for pair in named if decays(pair[1])]
    kept = [pair for pair in named if not decays(pair[1])]
    groups: list[dict[str, Any]] = [
        {"params": part, "weight_decay": decay}
        for part, decay in ((decayed, method.weight_decay), (kept, 0.0)) if part]
    if method.name in ("adam", "adamw"):
        kind = torch.optim.Adam if method.name == "adam" else torch.optim.AdamW
        return kind(groups, method.lr, method.betas, method.eps)
    return torch.optim.SGD(groups, method.lr, method.momentum)


def make_scheduler(optimizer: Optimizer, stage: Stage, steps_per_epoch: int) -> LambdaLR:
    """To be stepped after each step of the optimizer."""
    def factor(schedule: Schedule) -> Callable[[int], float]:
        return lambda step: schedule.at(step, steps_per_epoch, stage.epochs)

    factors = [factor(stage.method.schedule)] * len(optimizer.param_groups)
    if isinstance(optimizer, CaseOptimizer) and stage.rest is not None:
        own = len(optimizer.optimizers[0].param_groups)
        factors[own:] = [factor(stage.rest.schedule)] * (len(factors) - own)
    return LambdaLR(optimizer, factors)


def matching_modules(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """The names of modules that a pattern matches, in the model's order; * stands for no dot.

    Without patterns those in the model's `attention_layers`. Raises TrainError for a pattern that
    matches none, and a model without that attribute.
    """
    if not patterns:
        if not hasattr(model, "attention_layers"):
            raise TrainError(f"attention matching: {type(model).__name__} has no attention_layers, "
                             "so the recipe's loss has to name points")
        return list(model.attention_layers)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_modules()]

    def matches(name: str, pattern: str) -> bool:
        return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)

    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise TrainError(f"attention matching: {type(model).__name__} has no module {pattern}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


class StageLoss:
    """The loss of a stage: call it with images, the student's logits of them, and labels.

    The teacher is frozen and in evaluation mode. Both models are those that the wrappers wrap.
    """

    def __init__(self, loss: Loss, student: nn.Module, teacher: nn.Module | None) -> None:
        self.loss, self.teacher = loss, teacher
        self.taps: tuple[FeatureTap, FeatureTap] | None = None
        if loss.attention:
            assert teacher is not None
            self.taps = (FeatureTap(student, matching_modules(student, loss.points)),
                         FeatureTap(teacher, matching_modules(teacher, loss.teacher_points)))

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss, logits = self.loss, logits.float() if logits.dtype.itemsize < 4 else logits
        total = logits.new_zeros(())
        if loss.labels:
            total = total + loss.labels * F.cross_entropy(
                logits, labels, label_smoothing=loss.label_smoothing)
        if self.teacher is None:
            return total
        with torch.no_grad():
            target = self.teacher(images).to(logits.dtype)
        if loss.teachers:
            if target.dim() != 3 or target.shape[1:] != logits.shape:
                raise TrainError("the loss of several teachers needs outputs (teachers, "
                                 f"{', '.join(map(str, logits.shape))}) of the teacher, got "
                                 f"{tuple(target.shape)}: bitkernels.train.distillation.Teachers "
                                 "makes one module of several networks")
            return total + loss.teachers * soft_labels_loss(logits, target)
        if target.shape != logits.shape:
            raise TrainError(f"the teacher's outputs are {tuple(target.shape)}, the student's "
                             f"{tuple(logits.shape)}")
        if loss.distribution:
            total = total + loss.distribution * distribution_loss(logits, target)
        if loss.matching:
            total = total + loss.matching * output_matching_loss(logits, target, loss.temperature)
        if self.taps:
            total = total + loss.attention * attention_matching_loss(
                self.taps[0].features(), self.taps[1].features())
        return total

    def close(self) -> None:
        for tap in self.taps or ():
            tap.close()
