"""Networks by name: the published ones (`create_model`), and classes for any size (`create`)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from bitkernels._arguments import integer


@dataclass(frozen=True)
class Entry:
    """A published network: what makes it of its class, and what was published of it.

    build: the class, called as build(num_classes, in_channels, **options), with image_size where it
      takes one.
    paper: authors, year and arXiv number or venue.
    image_size, num_classes: of the publication.
    top1, top5: percent of ImageNet's validation images, as published; None where it was not.
    preprocessing: the name of what its images go through (`bitkernels.models.preprocessing`).
    """

    name: str
    build: Callable[..., nn.Module]
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 224
    num_classes: int = 1000
    top1: float | None = None
    top5: float | None = None
    preprocessing: str = "imagenet"


_ENTRIES: dict[str, Entry] = {}
# Classes that suit images of any size by default, for `create`.
_CLASSES: dict[str, type[nn.Module]] = {}


def register(name: str, build: Callable[..., nn.Module], paper: str, **published: Any) -> None:
    """Adds a published network; the fields are those of `Entry`."""
    if name in _ENTRIES:
        raise ValueError(f"there is a model {name} already")
    _ENTRIES[name] = Entry(name, build, paper, **published)


def register_class(name: str, cls: type[nn.Module]) -> None:
    """Gives `create` a class."""
    _CLASSES[name] = cls


def list_models(pattern: str = "*") -> list[str]:
    """The names of the published networks, sorted; those that match a pattern as "quicknet*"."""
    return sorted(name for name in _ENTRIES if fnmatch(name, pattern))


def entry(name: str) -> Entry:
    """What is known of a published network. Raises ValueError for a name that there is not."""
    if name not in _ENTRIES:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(list_models())}")
    return _ENTRIES[name]


def create_model(name: str, *, num_classes: int | None = None, in_channels: int = 3,
                 weights: str | os.PathLike[str] | None = None, **options: Any) -> nn.Module:
    """The published network of that name.

    num_classes: None: as published, 1000 for ImageNet.
    in_channels: of the images (N, in_channels, H, W).
    weights: a file, "hf-hub:owner/name", or the name of public weights, for `load_weights`; None:
      as initialised.
    options: further arguments of its class, as image_size for those that have linear layers on a
      map of fixed size, and binary_weights=False for the first step of a training in two steps.

    Its attribute `pretrained_config` is a dict of what made it, for `save_pretrained`.

    Raises ValueError for a name or an option that there is not, naming those that there are, and
    for sizes that are no integers of at least 1; what `load_weights` raises.
    """
    found = entry(name)
    given = _accepted(name, found.build, {**found.options, **options})
    if takes_image_size(found.build):
        given.setdefault("image_size", found.image_size)
    model = _made("create_model", name, found.build,
                  found.num_classes if num_classes is None else num_classes, in_channels, given)
    if weights is not None:
        from bitkernels.models.weights import load_weights

        load_weights(model, weights)
    return model


def names() -> list[str]:
    """The names that `create` takes, sorted."""
    return sorted(_CLASSES)


def create(name: str, *, num_classes: int = 10, in_channels: int = 3, image_size: int = 32,
           **options: Any) -> nn.Module:
    """The network of that class for images (N, in_channels, image_size, image_size).

    The defaults of these classes suit small images; `create_model` makes the published networks,
    and so does this for a name that no class has.

    options: further arguments of its class. image_size goes to the classes that ask for it.

    Its attribute `pretrained_config` is a dict of what made it, for `save_pretrained`.

    Raises ValueError for a name or an option that there is not, naming those that there are, and
    for sizes that are no integers of at least 1.
    """
    if name not in _CLASSES and name in _ENTRIES:
        if takes_image_size(_ENTRIES[name].build):
            options["image_size"] = image_size
        return create_model(name, num_classes=num_classes, in_channels=in_channels, **options)
    if name not in _CLASSES:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(names())}, and the "
                         f"published {', '.join(list_models())}")
    cls = _CLASSES[name]
    options = _accepted(name, cls, options)
    if takes_image_size(cls):
        options["image_size"] = image_size
    return _made("create", name, cls, num_classes, in_channels, options)


def _made(maker: str, name: str, build: Callable[..., nn.Module], num_classes: int,
          in_channels: int, options: dict[str, Any]) -> nn.Module:
    """The model, which remembers how it was made. Raises ValueError for sizes below 1."""
    num_classes = integer(maker, f"num_classes of {name}", num_classes)
    in_channels = integer(maker, f"in_channels of {name}", in_channels)
    if "image_size" in options:
        options["image_size"] = integer(maker, f"image_size of {name}", options["image_size"])
    model = build(num_classes, in_channels, **options)
    vars(model)["pretrained_config"] = dict(
        maker=maker, model=name, num_classes=num_classes, in_channels=in_channels,
        options=dict(options))
    return model


def takes_image_size(build: Callable[..., nn.Module]) -> bool:
    """Whether a class is made for one size of images."""
    return "image_size" in inspect.signature(build).parameters


def _accepted(name: str, build: Callable[..., nn.Module], options: dict[str, Any]
              ) -> dict[str, Any]:
    accepted = inspect.signature(build).parameters
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        own = sorted(set(accepted) - {"num_classes", "in_channels", "image_size"})
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(own)}")
    return options
