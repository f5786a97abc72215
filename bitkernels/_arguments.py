"""Checks of what constructors and functions are called with.

Each returns the value in its plain form, an int for an integer of NumPy, or raises ValueError that
names the argument, what it takes and what it got. Operators check their tensors themselves
(`bitkernels.ops._checks`).
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

INT_MAX = 2**31 - 1
REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Check = Callable[[str, str, Any], Any]  # of these: where, the argument's name, its value


def refuse(where: str, name: str, takes: str, got: Any) -> NoReturn:
    raise ValueError(f"{where}: {name} must be {takes}, got {shown(got)}")


def shown(value: Any) -> str:
    """A value in an error: itself where that is short, else what it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else type(value).__name__


def _is_bool(value: Any) -> bool:
    kind = type(value)
    return isinstance(value, bool) or kind.__module__ == "numpy" and kind.__name__ in (
        "bool", "bool_")


def integer(where: str, name: str, value: Any, least: int = 1, most: int = INT_MAX) -> int:
    """An integer, also of NumPy or symbolic; no bool, no tensor, no float."""
    takes = ("an integer" if least == -INT_MAX else f"an integer of at least {least}"
             if most == INT_MAX else f"an integer from {least} to {most}")
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if _is_bool(value) or isinstance(value, Tensor):
        refuse(where, name, takes, value)
    try:
        found = operator.index(value)
    except TypeError:
        refuse(where, name, takes, value)
    if not least <= found <= most:
        refuse(where, name, takes + (" and below 2**31" if found > most == INT_MAX else ""), value)
    return found


def sizes(where: str, name: str, value: Any, count: int, least: int = 1) -> tuple[int, ...]:
    """An integer for all dimensions of an image, or a sequence with one for each."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != count:
            refuse(where, name, f"an integer or {count} of them", value)
        return tuple(integer(where, name, n, least) for n in value)
    return (integer(where, name, value, least),) * count


def integers(where: str, name: str, value: Any, least: int = 1, count: int | None = None
             ) -> tuple[int, ...]:
    """A sequence of at least one integer, or of `count`."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value or (
            count is not None and len(value) != count):
        refuse(where, name, "a sequence of integers" if count is None else
               f"a sequence of {count} integers", value)
    return tuple(integer(where, name, n, least) for n in value)


def each(inner: Check, count: int | None = None) -> Check:
    """A sequence of what `inner` takes, `count` of them where that is given."""
    def checked(where: str, name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or (
                count is not None and len(value) != count):
            refuse(where, name, "a tuple" if count is None else f"{count} numbers", value)
        return tuple(inner(where, name, part) for part in value)
    return checked


def number(where: str, name: str, value: Any, least: float = -math.inf, most: float = math.inf, *,
           above: float | None = None, finite: bool = True) -> float:
    """A real number, also of NumPy; no bool, no tensor, no text, not NaN.

    above: what it has to be larger than. finite: whether infinities are refused.
    """
    bounds = ("" if least == -math.inf else f" of at least {least:g}"
              if most == math.inf else f" in [{least:g}, {most:g}]")
    if above is not None:
        bounds = f" above {above:g}" + ("" if most == math.inf else f" and at most {most:g}")
    takes = f"a {'finite ' if finite and most == math.inf else ''}number{bounds}"
    if _is_bool(value) or isinstance(value, Tensor) or not isinstance(value, numbers.Real):
        refuse(where, name, takes, value)
    found = float(value)
    if math.isnan(found) or finite and math.isinf(found) or not least <= found <= most or (
            above is not None and not found > above):
        refuse(where, name, takes, value)
    return found


def flag(where: str, name: str, value: Any) -> bool:
    """True or False, also as 1 or 0; nothing else that merely counts as such, as "no" does."""
    if not _is_bool(value) and not (type(value) is int and value in (0, 1)):
        refuse(where, name, "True or False", value)
    return bool(value)


def choice(where: str, name: str, value: Any, options: Sequence[Any]) -> Any:
    if not any(type(value) is type(option) and value == option for option in options):
        refuse(where, name, ("one of " if len(options) > 1 else "")
               + ", ".join(map(repr, options)), value)
    return value


def real_dtype(where: str, dtype: Any) -> Any:
    """None, or a type that parameters may have."""
    if dtype is not None and dtype is not float and dtype not in REAL:
        refuse(where, "dtype", "float32, float16, bfloat16 or float64", dtype)
    return dtype


def module(where: str, name: str, value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        refuse(where, name, "an nn.Module", value)
    return value


def function(where: str, name: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        refuse(where, name, "a function", value)
    return value
