"""What `binarize` did to a model, and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from bitkernels.nn.layer import BinaryLayer


@dataclass
class BinarizeReport:
    """What `binarize` changed and what it kept; `print` shows it. Keys are names of modules.

    binary: the layers that are binary now, with their new class.
    kept: the layers that stay real, with the reason.
    activations: the activations that were replaced, with the old and the new one.
    normalized: the layers with a batch norm before their sign, with what made that necessary.
    not_analysed: the layers for which nothing could be said but by the order of registration.
    single_signed: the layers whose input cannot be negative, with its source (activation="keep").
    binary_weights, real_parameters: how many there are now.
    """

    binary: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    normalized: dict[str, str] = field(default_factory=dict)
    not_analysed: list[str] = field(default_factory=list)
    single_signed: dict[str, str] = field(default_factory=dict)
    binary_weights: int = 0
    real_parameters: int = 0

    def count(self, model: nn.Module) -> None:
        weights = {id(p) for m in model.modules() if isinstance(m, BinaryLayer)
                   for name, p in m.named_parameters() if name == "weight"}
        for parameter in model.parameters():
            if id(parameter) in weights:
                self.binary_weights += parameter.numel()
            else:
                self.real_parameters += parameter.numel()

    def __str__(self) -> str:
        lines = [f"{len(self.binary)} layers became binary, {len(self.kept)} stay real; "
                 f"{self.binary_weights:,} binary weights, {self.real_parameters:,} real "
                 "parameters"]
        for title, entries in (
                ("real", self.kept), ("activations", self.activations),
                ("batch norm before the sign", self.normalized),
                ("input is never negative", self.single_signed),
                ("order of registration taken for the order of calls",
                 dict.fromkeys(self.not_analysed, "could not be traced"))):
            lines += [f"{title}: {reason}: {', '.join(names)}"
                      for reason, names in by_value(entries)]
        return "\n".join(lines)


def by_value(entries: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(value, keys that have it), in the order of the first keys."""
    keys = defaultdict(list)
    for key, value in entries.items():
        keys[value].append(key)
    return list(keys.items())
