"""The operators: one file each, and here their short names with their help.

`bitkernels.ops.packed_conv2d` is `torch.ops.bitkernels.packed_conv2d` itself, so a call costs
nothing more; it has a docstring. `help(bitkernels.ops.packed_conv2d)` shows schemas, arguments,
shapes, errors and an example; docs/operators.md is made of the same text. Within the package
`from bitkernels.ops.packed_conv2d import ...` names the file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from bitkernels.ops._record import GROUPS, OPERATORS

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

PARTS = ("Arguments", "Returns", "Errors", "Example")


def schemas(name: str) -> tuple[str, ...]:
    """Of every overload of an operator."""
    return OPERATORS[name].schemas


def parts(name: str) -> dict[str, str]:
    """The text of an operator by part: "" for the description, and `PARTS`."""
    found: dict[str, list[str]] = {"": []}
    for line in OPERATORS[name].text.strip("\n").splitlines():
        if line.rstrip(":") in PARTS and line.endswith(":"):
            found[line[:-1]] = []
        else:
            found[list(found)[-1]].append(line[2:] if len(found) > 1 else line)
    return {part: "\n".join(lines).strip("\n") for part, lines in found.items()}


def arguments(name: str) -> dict[str, str]:
    """What is said of each argument, in the order of the text."""
    said: dict[str, str] = {}
    for line in parts(name)["Arguments"].splitlines():
        if line.startswith(" "):
            said[list(said)[-1]] += " " + line.strip()
        else:
            argument, _, text = line.partition(": ")
            said[argument] = text
    return said


def _document(name: str) -> Any:
    operator = getattr(torch.ops.bitkernels, name)
    description, _, rest = OPERATORS[name].text.strip("\n").partition("\nArguments:")
    operator.__doc__ = "\n".join([description, *(f"    {s}" for s in schemas(name)), "",
                                  f"Arguments:{rest}"])
    return operator


__all__ = sorted(OPERATORS)
globals().update({name: _document(name) for name in OPERATORS})  # over the files of these names


def __getattr__(name: str) -> Any:  # for an operator that there is not, and for type checkers
    raise AttributeError(f"module 'bitkernels.ops' has no operator {name!r}; there are "
                         f"{', '.join(__all__)}")
