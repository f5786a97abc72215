"""What the constructors of networks are called with, checked by the names that they share."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

from bitkernels._arguments import choice, each, flag, integer, integers, number

# The least of each.
_INTEGERS = {"num_classes": 1, "in_channels": 1, "out_channels": 1, "image_size": 1, "hidden": 1,
             "width": 1, "stages": 1, "first_padding": 0, "activation_bits": 1, "stem_stride": 1,
             "stride": 1, "real_groups": 1}
_SEQUENCES = {"blocks": 0, "channels": 1, "filters": 1, "layers": 0, "features": 1, "strides": 1,
              "stem_strides": 1, "dilation": 1}
_FLAGS = ("binary_weights", "modulated")

Network = TypeVar("Network", bound=type[nn.Module])


def checked(cls: Network) -> Network:
    """A class whose constructor refuses, by ValueError with the argument's name, what is none, and
    gets plain integers, which files of settings can hold, and tuples for sequences."""
    init: Any = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **options: Any) -> None:
        bound = signature.bind(self, *args, **options)
        for name, value in bound.arguments.items():
            if value is not signature.parameters[name].default:
                bound.arguments[name] = _checked(cls.__name__, name, value,
                                                 signature.parameters[name])
        init(*bound.args, **bound.kwargs)

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


def _checked(where: str, name: str, value: Any, parameter: inspect.Parameter) -> Any:
    if name == "channels" and "Sequence" not in str(parameter.annotation):  # of one block
        return integer(where, name, value)
    if name == "features" and isinstance(value, (tuple, list)) and not value:  # of one section
        return ()
    if name in _SEQUENCES:
        return integers(where, name, value, _SEQUENCES[name])
    if name in _INTEGERS:
        return integer(where, name, value, _INTEGERS[name])
    if name in _FLAGS:
        return flag(where, name, value)
    if name == "stem":
        return choice(where, name, value, ("imagenet", "cifar"))
    if name == "norm_momentum":
        return number(where, name, value, 0, 1)
    if name == "reduction":
        return each(number)(where, name, value)
    return value  # a name, which the class itself knows
