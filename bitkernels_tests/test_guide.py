"""docs/guide.md: its code runs, and trains a torchvision ResNet-18 to 90 percent of the digits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bitkernels.nn as bnn

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def python_blocks(page: Path) -> dict[str, list[str]]:
    """The Python code of a page by the heading that it is under. Lines keep their numbers."""
    blocks: dict[str, list[str]] = {}
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        heading = re.findall(r"^#+ (.*)$", text[:match.start()], re.MULTILINE)[-1]
        blank = "\n" * text.count("\n", 0, match.start(1))
        blocks.setdefault(heading, []).append(blank + match[1])
    return blocks


@pytest.fixture(scope="module")
def guide(torchvision):
    """Runs what is under a heading; all of the page share their names."""
    pytest.importorskip("sklearn")
    blocks, names = python_blocks(GUIDE), {"__name__": "guide"}
    state = torch.get_rng_state()

    def run(heading: str) -> dict:
        for block in blocks[heading]:
            exec(compile(block, str(GUIDE), "exec"), names)
        return names

    yield run
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def trained(guide):
    guide("Make it binary")
    return guide("Train it")


def test_it_learns_and_packs(guide, trained):
    assert trained["accuracy"](trained["model"].eval()) > 0.9
    a, b = trained["test_x"][0], trained["test_x"][1]
    with torch.no_grad():
        y = trained["model"](torch.stack([a, b]))
    assert not torch.equal(y[0], y[1])
    assert guide("Pack it")["packed"] is not trained["model"]


@pytest.mark.skipif(not hasattr(bnn, "save_packed"), reason="no save_packed")
def test_it_is_saved_and_loaded(guide, trained):
    pytest.importorskip("safetensors")
    guide("Pack it")
    guide("Save it")


@pytest.mark.skipif(not hasattr(bnn, "save_packed"), reason="no export of packed layers")
def test_it_is_exported(guide, trained):
    pytest.importorskip("onnxscript")
    guide("Pack it")
    guide("Save it")
    guide("Export it")


def test_every_block_is_run():
    assert list(python_blocks(GUIDE)) == [
        "Make it binary", "Train it", "Pack it", "Save it", "Export it"]
