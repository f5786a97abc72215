"""Reads and runs the blocks of code of a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitkernels_tests import ROOT

DOCS = ROOT / "docs"


def blocks(page: Path, language: str = "python") -> list[tuple[int, str]]:
    """(line of the fence, code) of every block of a language."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(match.string.count("\n", 0, match.start()) + 1, match.group(2)) for match in found
            if match.group(1) == language]


def sections(page: Path) -> dict[str, list[tuple[int, str]]]:
    """The blocks of Python by the heading that they are under."""
    lines, found = page.read_text().split("\n"), {}
    for line, code in blocks(page):
        heading = next(text for text in reversed(lines[:line]) if text.startswith("#"))
        found.setdefault(heading.lstrip("# "), []).append((line, code))
    return found


def execute(page: Path, code: list[tuple[int, str]], space: dict[str, Any]) -> None:
    """A failure's traceback has the page and the line."""
    for line, text in code:
        exec(compile("\n" * line + text, str(page), "exec"), space)


def run(page: Path, changes: dict[str, str] | None = None) -> dict[str, Any]:
    """Execute a page's blocks of Python from top to bottom in one namespace, and return that.

    changes: what to put for what in the code, to make it smaller; each must be there.
    """
    code = blocks(page)
    for old, new in (changes or {}).items():
        assert any(old in text for _, text in code), f"{page.name} has no {old!r}"
        code = [(line, text.replace(old, new)) for line, text in code]
    space: dict[str, Any] = {"__name__": "__main__"}
    execute(page, code, space)
    return space
