"""A stage under way: what is compiled, and how."""

from contextlib import ExitStack

import pytest
import torch

from bitkernels import models
from bitkernels.train import Options, datasets, fit, recipes
from bitkernels.train.distributed import Group
from bitkernels.train.run import Run
from bitkernels.train.trainer import Trainer


def build():
    torch.manual_seed(0)
    return models.create("reactnet", in_channels=1, image_size=8, channels=(8, 16))


@pytest.fixture
def compiled(monkeypatch):
    """What torch.compile is given, which the backend `eager` runs."""
    seen, compile_ = [], torch.compile

    def record(net, mode=None):
        seen.append(mode)
        return compile_(net, backend="eager")

    monkeypatch.setattr(torch, "compile", record)
    return seen


@pytest.mark.parametrize("device, size, mode", [
    ("cpu", 1, None), ("cuda", 1, "reduce-overhead"), ("cuda", 2, None)])
def test_graphs_are_for_one_gpu(compiled, monkeypatch, device, size, mode):
    monkeypatch.setattr(Group, "wrap", lambda self, model, device: model)
    recipe = recipes.get("quicknet-digits")
    run = Run(build, recipe, datasets.digits(), None, Options(device, compile=True), 0,
              Group(size=size), torch.device(device), {}, None)
    with ExitStack() as stack:
        Trainer(run, 0, build(), stack)
    assert compiled == [mode]


def test_a_compiled_run_trains_as_the_other(compiled):
    recipe = recipes.get("quicknet-digits").scaled(epochs=1)
    results = [fit(build, recipe, datasets.digits(), options=Options(compile=on))
               for on in (False, True)]
    assert compiled == [None] and results[1].rows[-1]["train_loss"] == pytest.approx(
        results[0].rows[-1]["train_loss"], rel=1e-3)
