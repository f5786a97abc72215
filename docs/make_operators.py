"""Writes what is made of the operators' records: docs/operators.md, the types of `bitkernels.ops`,
and the schemas for programs without Python."""

from __future__ import annotations

import sys
from pathlib import Path

from bitkernels import ops
from bitkernels.ops._record import GROUPS, OPERATORS

PAGE = Path(__file__).with_name("operators.md")
STUB = PAGE.parents[1] / "bitkernels" / "ops" / "__init__.pyi"
SCHEMAS = PAGE.parents[1] / "csrc" / "torch" / "operator_schemas.inc"
HEAD = """\
# Operators

Written by `python docs/make_operators.py` from the records in `bitkernels/ops`; do not edit.

Every operator is `torch.ops.bitkernels.NAME`, and the same object is `bitkernels.ops.NAME`, whose
`help` shows what is here. The numeric contract is in [architecture.md](architecture.md). A failed
check is a RuntimeError that names the operator, the argument, what it takes and what it got.

In the examples:

```python
import torch
import torch.nn.functional as F
from bitkernels import ops
from bitkernels.ops._record import GROUPS, OPERATORS
```
"""


def page() -> str:
    lines = [HEAD]
    groups = {group: [name for name, operator in OPERATORS.items() if operator.group == group]
              for group in GROUPS}
    for group, names in groups.items():
        lines.append(f"- {group}: " + ", ".join(f"[{name}](#{name})" for name in names))
    for group, names in groups.items():
        lines.append(f"\n## {group}")
        for name in names:
            lines += ["", section(name)]
    return "\n".join(lines) + "\n"


def section(name: str) -> str:
    parts = ops.parts(name)
    rows = [f"| `{argument}` | {text.replace('|', chr(92) + '|')} |"
            for argument, text in ops.arguments(name).items()]
    return "\n".join([
        f"### {name}", "", parts[""], "", "```", *ops.schemas(name), "```", "",
        "| argument | |", "|---|---|", *rows, "",
        f"**Returns** {_joined(parts['Returns'])}", "", f"**Errors** {_joined(parts['Errors'])}",
        "", "```pycon", parts["Example"], "```"])


def _joined(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines())


def stub() -> str:
    """For type checkers, which else take the files of the operators for what the names mean."""
    return "\n".join([
        '"""Written by `python docs/make_operators.py`; do not edit."""', "",
        "from typing import Any", "", "PARTS: tuple[str, ...]", "",
        "def schemas(name: str) -> tuple[str, ...]: ...",
        "def parts(name: str) -> dict[str, str]: ...",
        "def arguments(name: str) -> dict[str, str]: ...", "",
        *(f"{name}: Any" for name in ops.__all__), "", "__all__ = [",
        *(f'    "{name}",' for name in ops.__all__), "]"]) + "\n"


def schemas() -> str:
    """For the engine, which defines them where no Python does."""
    return "\n".join([
        "// Written by `python docs/make_operators.py`; do not edit.", "// clang-format off",
        *(f'R"({schema})",' for name in OPERATORS for schema in OPERATORS[name].schemas)]) + "\n"


if __name__ == "__main__":
    if not STUB.parent.samefile(Path(ops.__file__).parent):
        sys.exit(f"make_operators: bitkernels was imported from {Path(ops.__file__).parents[1]}, "
                 f"which is another tree; set PYTHONPATH={PAGE.parents[1]}")
    for path, text in ((PAGE, page()), (STUB, stub()), (SCHEMAS, schemas())):
        path.write_text(text)
        print(f"wrote {path}", file=sys.stderr)
