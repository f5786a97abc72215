"""docs/guide.md: its code runs, and trains a torchvision ResNet-18 to 90 percent of the digits."""

from __future__ import annotations

import pytest
import torch

from bitkernels_tests.docs_blocks import DOCS, execute, sections

GUIDE = DOCS / "guide.md"


@pytest.fixture(scope="module")
def guide(torchvision):
    """Runs what is under a heading; all of the page share their names."""
    pytest.importorskip("sklearn")
    parts, names = sections(GUIDE), {"__name__": "guide"}
    state = torch.get_rng_state()

    def run(heading: str) -> dict:
        execute(GUIDE, parts[heading], names)
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


def test_it_is_saved_and_loaded(guide, trained):
    pytest.importorskip("safetensors")
    guide("Pack it")
    guide("Save it")


def test_it_is_exported(guide, trained):
    pytest.importorskip("onnxscript")
    guide("Pack it")
    guide("Save it")
    guide("Export it")


def test_every_block_is_run():
    assert list(sections(GUIDE)) == [
        "Make it binary", "Train it", "Pack it", "Save it", "Export it"]
