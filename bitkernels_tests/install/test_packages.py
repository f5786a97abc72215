"""What is said about missing packages: a command that works as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import bitkernels
from bitkernels._packages import needs
from bitkernels.train import TrainError, checkpoint, datasets, logs

SOURCE = Path(bitkernels.__file__).parents[1]


def test_needs():
    assert needs("plots", "matplotlib") == (
        "plots need matplotlib, which is not installed: pip install matplotlib")
    assert needs("plots", "matplotlib", ImportError("no font")) == (
        "plots need matplotlib, which cannot be imported (no font): pip install matplotlib")


@pytest.mark.parametrize("module, package, call", [
    ("sklearn", "scikit-learn", datasets.digits),
    ("safetensors", "safetensors", lambda: checkpoint.import_weights(Path("w.safetensors"))),
    ("torch.utils.tensorboard", "tensorboard", lambda: logs.TensorBoard(Path("."), 0)),
    ("tqdm", "tqdm", lambda: logs.Bar("stage", 1, 0)),
])
def test_each_missing_package_is_named_with_its_command(module, package, call, monkeypatch,
                                                        tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("w.safetensors").write_bytes(b"")
    for name in (module, *(f"{module}.{part}" for part in ("torch", "datasets"))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainError, match=rf"need {package}, which .*: pip install {package}$"):
        call()


def test_nothing_is_installed_by_a_name_that_no_index_has():
    """bitkernels itself is installed from its source, so are its extras."""
    files = [*Path(bitkernels.__file__).parent.rglob("*.py"),
             *(path for kind in ("*.md", "docs/*.md", "benchmarks/*.py", "examples/*.py")
               for path in SOURCE.glob(kind))]
    wrong = re.compile(r"pip install [^\n`]*\bbitkernels(?:\[|\b(?![-./]))")
    found = {str(path): line for path in files for line in path.read_text().splitlines()
             if wrong.search(line)}
    assert not found
