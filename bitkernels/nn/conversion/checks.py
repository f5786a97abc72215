"""What the functions on whole models refuse to take for one."""

from __future__ import annotations

from torch import nn


def check_model(function: str, model: object) -> None:
    """Raises TypeError for what is not a module, a module's class for one."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function}: model must be an nn.Module, got {got}")
