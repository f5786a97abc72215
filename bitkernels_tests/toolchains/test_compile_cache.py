"""Compiled graphs on disk: this version's are found again, another version's are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitkernels
from bitkernels import _compile_cache

PACKAGE = Path(bitkernels.__file__).parent
# Trains a layer by a compiled step. Prints the input's gradient, and whether the graph was found.
STEP = """
import torch, bitkernels
from torch._dynamo.utils import counters
x = torch.linspace(-2, 2, 64).view(1, 4, 4, 4).requires_grad_()
layer = bitkernels.nn.BinaryConv2d(4, 2, 3)
torch.nn.init.ones_(layer.weight)
torch.compile(lambda x: layer(x))(x).sum().backward()
print(int((x.grad != 0).sum()), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package, without its engine."""
    shutil.copytree(PACKAGE, tmp_path / "bitkernels",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path / "bitkernels"


def test_the_tag_is_of_the_sources(package):
    own = _compile_cache.tag(PACKAGE)
    assert torch.compiler.config.cache_key_tag.split()[-1:] == [own]
    assert _compile_cache.tag(package) == own
    for name in ("ops/_training.py", "_dispatch.py", "_estimators.py"):
        file = package / name
        text = file.read_text()
        file.write_text(text + "# another\n")
        assert _compile_cache.tag(package) != own, name
        file.write_text(text)
    (package / "nn" / "layer.py").write_text("")  # traced from the model: in its graph
    assert _compile_cache.tag(package) == own


def test_the_user_s_tag_stays():
    config = torch.compiler.config
    before = config.cache_key_tag
    with config.patch(cache_key_tag="mine"):  # a monkeypatch would delete it at its end
        _compile_cache.mark()
        assert config.cache_key_tag.split() == ["mine", _compile_cache.tag(PACKAGE)]
    assert config.cache_key_tag == before


@pytest.mark.every
def test_an_upgrade_s_gradients_are_the_new_ones(package, tmp_path):
    def run() -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", STEP], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "BITKERNELS_CPU": "reference",
                 "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr[-2000:]
        gradients, hits = done.stdout.split()
        return int(gradients), int(hits)

    masked, found = run()
    assert found == 0 and 0 < masked < 64 and run() == (masked, 1)
    file = package / "ops" / "_training.py"
    line = 'return inside(grad)("mask_grad", grad, saved, dim % grad.dim())'
    text = file.read_text()
    assert text.count(line) == 1
    file.write_text(text.replace(line, "return grad"))
    assert run() == (64, 0)
