"""Checks of what recipes and options are made of."""

from __future__ import annotations

from typing import Any

from bitkernels._arguments import Check, choice, integer, number, refuse


def check(owner: Any, **checks: Check) -> None:
    """Checks fields of a frozen dataclass by functions of (where, name, value); numbers of NumPy
    become plain ones, which checkpoints hold.

    Raises ValueError with the class, the field, what it takes and what it got.
    """
    for name, function in checks.items():
        given = getattr(owner, name)
        plain = function(type(owner).__name__, name, given)
        if type(given) not in (int, float, bool, str, tuple):
            object.__setattr__(owner, name, plain)


def one_of(*options: str) -> Check:
    return lambda where, name, value: choice(where, name, value, options)


def numbers(least: float = 0, most: float = float("inf")) -> Check:
    return lambda where, name, value: number(where, name, value, least, most)


def above_0(where: str, name: str, value: Any) -> float:
    return number(where, name, value, above=0)


def whole(least: int) -> Check:
    return lambda where, name, value: integer(where, name, value, least)


def optional(inner: Check) -> Check:
    return lambda where, name, value: None if value is None else inner(where, name, value)


def text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(where, name, "a string", value)
    return value


def instance(cls: type) -> Check:
    def checked(where: str, name: str, value: Any) -> Any:
        if not isinstance(value, cls):
            refuse(where, name, f"a {cls.__name__}", value)
        return value
    return checked
