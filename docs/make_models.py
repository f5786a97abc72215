"""Writes the table of published networks into docs/models.md."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import bitkernels.counting
from bitkernels import models
from bitkernels.models.registry import entry
from bitkernels.models.weights import public_weights

PAGE = Path(__file__).with_name("models.md")
START, END = "<!-- made by docs/make_models.py -->\n", "<!-- end -->\n"
HEAD = """\
| name | paper | parameters | binary | MB packed | 1-bit MACs | OPs, ReActNet's | OPs, BNext's | \
top-1 % | weights |
|---|---|---|---|---|---|---|---|---|---|
"""


def published(name: str) -> bitkernels.counting.Summary:
    """The summary of a network at its published size; it is built without values."""
    size = entry(name).image_size
    with torch.device("meta"):
        return bitkernels.summary(models.create_model(name), (1, 3, size, size))


def row(name: str, found: bitkernels.counting.Summary) -> str:
    """Of the table."""
    known = entry(name)
    files = [f"`{file.name}`" if file.url else f"[{file.name}]({file.page})"
             for file in public_weights(name) if file.head]
    cells = [f"`{name}`", known.paper, f"{found.parameters:,}", f"{found.weights.get(1, 0):,}",
             f"{found.larq.bytes / 1e6:.2f}", f"{found.macs.get(1, 0) / 1e9:.3f} G",
             f"{found.reactnet.ops / 1e6:.1f} M", f"{found.bnext.ops / 1e6:.1f} M",
             str(known.top1 or "-"), ", ".join(files) or "-"]
    return f"| {' | '.join(cells)} |\n"


def rows(page: str) -> dict[str, str]:
    """The rows of the page's table, by name."""
    table = page.partition(START)[2].partition(END)[0].removeprefix(HEAD)
    return {line.split("`")[1]: line for line in table.splitlines(keepends=True)}


def written(page: str) -> str:
    """The page with the table of now."""
    before, _, rest = page.partition(START)
    return before + START + HEAD + "".join(
        row(name, published(name)) for name in models.list_models()) + END \
        + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}", file=sys.stderr)
