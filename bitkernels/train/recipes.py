"""Recipes: how published binary networks were trained, as values to read, print and change.

    recipe = recipes.get("adambnn").scaled(epochs=10)
    recipe = dataclasses.replace(recipe, stages=recipe.stages[:1])
    print(recipe)

A `Recipe` is a sequence of stages; a `Stage` says what is binary in it, how its weights are updated
(`Method`, with a `Schedule` of the learning rate) and what is minimised (`Loss`). Running one is
`bitkernels.train.fit`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bitkernels._arguments import each, flag, integer
from bitkernels.train.arguments import above_0, check, instance, numbers, one_of, optional, text

__all__ = ["Loss", "Method", "Recipe", "Schedule", "Stage", "get", "names"]


AUGMENTATIONS = ("none", "shift", "shift-flip", "resized-crop", "resized-crop-bicubic")


@dataclass(frozen=True)
class Schedule:
    """What the learning rate is multiplied with at a step.

    kind: "constant"; "linear", from 1 to `final`; "cosine", half a cosine from 1 to `final`;
      "steps", times `factor` from each epoch of `milestones` on.
    per: "step", a new value at every step, with `final` at the last one; "epoch", one value an
      epoch, which of epoch e of E (from 0) is the one at e / E: `final` itself is not reached.
    warmup: epochs at the start in which the factor rises linearly from 0 to 1, per step.
    """

    kind: Literal["constant", "linear", "cosine", "steps"] = "constant"
    per: Literal["step", "epoch"] = "step"
    final: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        check(self, kind=one_of("constant", "linear", "cosine", "steps"),
              per=one_of("step", "epoch"), final=numbers(), milestones=each(numbers()),
              factor=numbers(), warmup=numbers())

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The factor at a step of a stage, counted from 0."""
        warmup, total = round(self.warmup * steps_per_epoch), steps_per_epoch * epochs
        if step < warmup:
            return step / max(warmup - 1, 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "steps":
            return self.factor ** sum(step >= m * steps_per_epoch for m in self.milestones)
        if self.per == "epoch":
            done = step // steps_per_epoch / epochs
        else:
            done = min((step - warmup) / max(total - warmup - 1, 1), 1.0)
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 + (self.final - 1) * done

    def stretched(self, ratio: float) -> Schedule:
        """For a stage whose number of epochs is `ratio` times as large."""
        return replace(self, warmup=self.warmup * ratio,
                       milestones=tuple(m * ratio for m in self.milestones))


@dataclass(frozen=True)
class Method:
    """How parameters are updated.

    name: "adam" (weight decay added to the gradient, as `torch.optim.Adam`), "adamw" (apart from
      it, `torch.optim.AdamW`), "sgd" or "bop".
    lr: the learning rate; Bop's gamma.
    weight_decay: of the parameters that `decay` names: "filters", those of four dimensions
      (convolutions), "others", all but those, or "all". Bop has none.
    """

    name: Literal["adam", "adamw", "sgd", "bop"]
    lr: float
    schedule: Schedule = Schedule()
    betas: tuple[float, float] = (0.9, 0.999)  # Adam
    eps: float = 1e-8  # Adam
    momentum: float = 0.0  # SGD
    threshold: float = 1e-8  # Bop's tau
    weight_decay: float = 0.0
    decay: Literal["filters", "others", "all"] = "filters"

    def __post_init__(self) -> None:
        check(self, name=one_of("adam", "adamw", "sgd", "bop"), lr=numbers(),
              schedule=instance(Schedule), betas=each(numbers(0, 1), 2), eps=numbers(),
              momentum=numbers(), threshold=numbers(), weight_decay=numbers(),
              decay=one_of("filters", "others", "all"))


@dataclass(frozen=True)
class Loss:
    """A weighted sum; a weight of 0 leaves a term out.

    labels: cross-entropy with the labels, smoothed by `label_smoothing`.
    distribution: -sum softmax(teacher) log_softmax(student), the mean over the batch (ReActNet).
    matching: temperature^2 times the Kullback-Leibler divergence of the student's from the
      teacher's outputs, both softened by `temperature` (Hinton et al. 2015).
    teachers: `soft_labels_loss` of several teachers (BNext); the teacher then is one module that
      gives their logits, (teachers, N, classes), as `bitkernels.train.distillation.Teachers`.
    attention: attention matching (Martinez et al. 2020, section 4.2) between the outputs of the
      modules that `points` names in the student and `teacher_points` in the teacher. Names may
      have the wildcards of `fnmatch`, where * does not stand for a dot. Empty: the names that the
      model has in its attribute `attention_layers`, as those of `bitkernels.models`.
    """

    labels: float = 1.0
    label_smoothing: float = 0.0
    distribution: float = 0.0
    matching: float = 0.0
    temperature: float = 1.0
    attention: float = 0.0
    points: tuple[str, ...] = ()
    teacher_points: tuple[str, ...] = ()
    teachers: float = 0.0

    def __post_init__(self) -> None:
        check(self, labels=numbers(), label_smoothing=numbers(0, 1), distribution=numbers(),
              matching=numbers(), temperature=above_0, attention=numbers(), points=each(text),
              teacher_points=each(text), teachers=numbers())
        if self.teachers and (self.distribution or self.matching or self.attention):
            raise ValueError("Loss: teachers cannot be joined with the terms of a single teacher, "
                             "distribution, matching and attention")

    @property
    def needs_teacher(self) -> bool:
        return bool(self.distribution or self.matching or self.attention or self.teachers)


@dataclass(frozen=True)
class Stage:
    """One training of the network from start to end.

    name: also the name of the file with the stage's weights.
    batch_size: of all processes together.
    activations: "binary", or "tanh" in place of every sign of an activation.
    weights: "binary" or "real": whether binary layers use the signs of their weights.
    method: of all parameters, or of the binary weights if `rest` is given; then `rest` is that of
      all other parameters.
    augmentation: "none"; "shift", by up to an eighth of the size; "shift-flip", and mirrored;
      "resized-crop", a random part of 8 to 100 % of the area and mirrored; "resized-crop-bicubic".
    start: the earlier stage whose weights this one starts from, all of them; None: fresh ones.
    teacher: the earlier stage whose network is the teacher; "given": one that the caller gives.
    signs_at_start: set the binary weights to -1 and +1 before the first step (Bop).
    latent_clip: clamp the latent weights to [-latent_clip, latent_clip] after each step.
    gradient_clip: scale the gradients down to this norm, of all parameters together, where it is
      larger.
    """

    name: str
    epochs: int
    batch_size: int
    method: Method
    rest: Method | None = None
    loss: Loss = Loss()
    activations: Literal["binary", "tanh"] = "binary"
    weights: Literal["binary", "real"] = "binary"
    augmentation: str = "shift-flip"
    start: str | None = None
    teacher: str | None = None
    signs_at_start: bool = False
    latent_clip: float | None = None
    gradient_clip: float | None = None

    def __post_init__(self) -> None:
        check(self, name=text, method=instance(Method), rest=optional(instance(Method)),
              loss=instance(Loss), activations=one_of("binary", "tanh"),
              weights=one_of("binary", "real"), augmentation=text, start=optional(text),
              teacher=optional(text), signs_at_start=flag, latent_clip=optional(above_0),
              gradient_clip=optional(above_0))

    def with_epochs(self, epochs: int) -> Stage:
        """The same with other epochs; warm-up and milestones keep their share of them."""
        ratio = epochs / self.epochs
        rest = self.rest and replace(self.rest, schedule=self.rest.schedule.stretched(ratio))
        return replace(self, epochs=epochs, rest=rest, method=replace(
            self.method, schedule=self.method.schedule.stretched(ratio)))

    def with_rates(self, bop: float, others: float) -> Stage:
        """The same with the learning rates of Bop and of other methods times these factors."""
        def rated(method: Method) -> Method:
            return replace(method, lr=method.lr * (bop if method.name == "bop" else others))

        return replace(self, method=rated(self.method), rest=self.rest and rated(self.rest))


@dataclass(frozen=True)
class Recipe:
    """Stages, where they come from, and what was chosen where sources differ.

    model: the name of `bitkernels.models` that it is made for, "" for any; model_options: its
      arguments, NAME=VALUE.

    Raises ValueError for stages that name no earlier stage, share a name, want a teacher that they
    do not name, or have epochs or a batch size that is no integer of at least 1.
    """

    name: str
    stages: tuple[Stage, ...]
    source: str = field(default="", compare=False)
    notes: str = field(default="", compare=False)
    model: str = field(default="", compare=False)
    model_options: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check(self, name=text, stages=each(instance(Stage)), source=text, notes=text, model=text,
              model_options=each(text))
        known: list[str] = []
        for stage in self.stages:
            where = f"recipe {self.name}, stage {stage.name}"
            if stage.name in (*known, "given", "checkpoint", "model"):
                raise ValueError(f"{where}: the name is taken")
            for what in (stage.start, stage.teacher if stage.teacher != "given" else None):
                if what is not None and what not in known:
                    raise ValueError(f"{where}: no earlier stage {what!r}, only {known}")
            if stage.loss.needs_teacher != (stage.teacher is not None):
                raise ValueError(f"{where}: a teacher and a loss that uses one need each other")
            for what in ("epochs", "batch_size"):
                object.__setattr__(stage, what, integer(where, what, getattr(stage, what)))
            known.append(stage.name)
        if not self.stages:
            raise ValueError(f"recipe {self.name} has no stages")

    def scaled(self, epochs: int | None = None, batch_size: int | None = None,
               lr: float | None = None, gamma: float | None = None,
               augmentation: str | None = None) -> Recipe:
        """Every stage with other epochs, rates and so on; None keeps what is there.

        lr, gamma: of the first Adam or SGD, and of the first Bop; further ones, also of later
        stages, keep their ratio to it. Rates do not follow the batch size by themselves.

        Raises ValueError for a rate of a method that the recipe does not have.
        """
        factors = []
        for what, value, bop in (("gamma", gamma, True), ("lr", lr, False)):
            rates = [method.lr for stage in self.stages for method in (stage.method, stage.rest)
                     if method is not None and (method.name == "bop") == bop]
            if value is not None and not rates:
                raise ValueError(f"recipe {self.name} has no {what} to change")
            factors.append(1.0 if value is None else value / rates[0])
        stages = [stage.with_rates(*factors) for stage in self.stages]
        if epochs is not None:
            stages = [stage.with_epochs(epochs) for stage in stages]
        if batch_size is not None:
            stages = [replace(stage, batch_size=batch_size) for stage in stages]
        if augmentation is not None:
            stages = [replace(stage, augmentation=augmentation) for stage in stages]
        return replace(self, stages=tuple(stages))

    def settings(self) -> dict[str, Any]:
        """Everything that changes the numbers, flat: "step1.method.lr": 0.00125.

        What was added later is left out where it is not used: earlier checkpoints go on.
        """
        flat: dict[str, Any] = {"name": self.name}

        def walk(prefix: str, value: Any) -> None:
            if dataclasses.is_dataclass(value):
                for f in dataclasses.fields(value):
                    if f.name in _ADDED_LATER and getattr(value, f.name) == f.default:
                        continue
                    walk(f"{prefix}.{f.name}", getattr(value, f.name))
            else:
                flat[prefix] = list(value) if isinstance(value, tuple) else value

        for stage in self.stages:
            walk(stage.name, stage)
        return flat

    def __str__(self) -> str:
        """One block a stage, with what differs from the defaults."""
        lines = [f"{self.name}: {self.source}".rstrip(": ")]
        if self.model:
            lines.append(f"  model {' '.join([self.model, *self.model_options])}")
        for stage in self.stages:
            lines.append(f"  {stage.name}")
            lines += [f"    {f.name} = {_short(getattr(stage, f.name))}"
                      for f in dataclasses.fields(stage) if f.name != "name"
                      and (getattr(stage, f.name) != f.default or f.name in _ALWAYS)]
        return "\n".join(lines + [f"  {line}" for line in self.notes.splitlines()])


_ADDED_LATER = ("gradient_clip", "teachers")
_ALWAYS = ("activations", "weights", "loss", "augmentation")


def _short(value: Any) -> str:
    """A dataclass by the fields that differ from their defaults."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    parts = [f"{f.name}={_short(getattr(value, f.name))}" for f in dataclasses.fields(value)
             if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(parts)})"


def get(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError, with the names there are."""
    from bitkernels.train.published import RECIPES

    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def names() -> list[str]:
    from bitkernels.train.published import RECIPES

    return list(RECIPES)
