"""Networks by name, for the command line and for experiments."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from bitkernels.models.binarynet import BinaryNet
from bitkernels.models.quicknet import QuickNet
from bitkernels.models.reactnet import ReActNet
from bitkernels.models.reactnet18 import ReActNet18

_MODELS: dict[str, type[nn.Module]] = {
    "binarynet": BinaryNet,
    "quicknet": QuickNet,
    "reactnet": ReActNet,
    "reactnet-18": ReActNet18,
}


def names() -> list[str]:
    """The names that `create` takes, sorted."""
    return sorted(_MODELS)


def create(name: str, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
           **options: Any) -> nn.Module:
    """The network of that name for images (N, in_channels, image_size, image_size).

    options: further arguments of its class. image_size goes to the classes that ask for it.

    Raises ValueError for a name or an option that there is not, naming those that there are.
    """
    if name not in _MODELS:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(names())}")
    cls = _MODELS[name]
    accepted = inspect.signature(cls).parameters
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        own = sorted(set(accepted) - {"num_classes", "in_channels", "image_size"})
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(own)}")
    if "image_size" in accepted:
        options["image_size"] = image_size
    return cls(num_classes, in_channels, **options)
