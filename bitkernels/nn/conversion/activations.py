"""Activations that leave something to a sign, in place of those that are never negative."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from bitkernels.nn.activations import RPReLU
from bitkernels.nn.hooks import is_patched

Activation = Literal["prelu", "rprelu", "hardtanh", "keep"]

ACTIVATIONS = ("prelu", "rprelu", "hardtanh", "keep")
_REPLACEABLE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.Sigmoid, nn.Hardsigmoid,
                nn.Softplus)


def is_replaceable(module: Any) -> bool:
    """Whether all that a module is, is one of PyTorch's activations."""
    return type(module) in _REPLACEABLE and not is_patched(module)


def replacement(activation: Activation, channels: set[int | None], device, dtype) -> nn.Module:
    """A new activation. `channels`: those of the calls of the old one, None for unknown ones.

    A slope (and shifts) per channel as in published networks, where all calls have the same
    channels; one slope where they differ, as for the one `relu` of a torchvision Bottleneck.
    """
    if activation == "hardtanh":
        return nn.Hardtanh()
    count = next(iter(channels)) if len(channels) == 1 else None
    if activation == "rprelu" and count is not None:
        return RPReLU(count, device=device, dtype=dtype)
    return nn.PReLU(1 if count is None else count, device=device, dtype=dtype)
