"""The operators under short names, with their help.

`bitkernels.ops.packed_conv2d` is `torch.ops.bitkernels.packed_conv2d` itself, so a call costs
nothing more; importing this module gives it a docstring. `help(bitkernels.ops.packed_conv2d)` shows
schemas, arguments, shapes, errors and an example; docs/operators.md is made of the same text.
"""

from __future__ import annotations

from typing import Any

import torch

from bitkernels._ops import SCHEMAS
from bitkernels.ops import bits, block, packed, train

# The sections of docs/operators.md.
GROUPS = {
    "Training": train.TEXTS,
    "Bits": bits.TEXTS,
    "Products of bits": packed.TEXTS,
    "The residual block": block.TEXTS,
}
TEXTS = {name: text.strip("\n") for texts in GROUPS.values() for name, text in texts.items()}
PARTS = ("Arguments", "Returns", "Errors", "Example")


def schemas(name: str) -> list[str]:
    """Of every overload of an operator."""
    return [s for s in SCHEMAS if s.split("(")[0].split(".")[0] == name]


def parts(name: str) -> dict[str, str]:
    """The text of an operator by part: "" for the description, and `PARTS`."""
    found: dict[str, list[str]] = {"": []}
    for line in TEXTS[name].splitlines():
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
    description, _, rest = TEXTS[name].partition("\nArguments:")
    operator.__doc__ = "\n".join([description, *(f"    {s}" for s in schemas(name)), "",
                                  f"Arguments:{rest}"])
    return operator


__all__ = list(TEXTS)
globals().update({name: _document(name) for name in TEXTS})


def __getattr__(name: str) -> Any:  # for an operator that has no text, and for type checkers
    raise AttributeError(f"module 'bitkernels.ops' has no operator {name!r}; there are "
                         f"{', '.join(TEXTS)}")
