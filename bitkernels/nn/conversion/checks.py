"""What the functions on whole models refuse to take for one."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy


def check_model(function: str, model: object) -> None:
    """Raises TypeError for what is not a module, a module's class for one, and as below."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{function}: model must be an nn.Module, got {got}")
    check_shapes(function, model)


def check_shapes(function: str, model: nn.Module) -> None:
    """Raises ValueError where lazy layers have no shapes yet."""
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ValueError(f"{function}: {', '.join(lazy)} of the model has no shape yet; run one "
                         "batch through the lazy layers first")
