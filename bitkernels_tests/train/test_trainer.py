"""A stage under way: what is compiled, and how."""

import os
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels.models import preprocessing
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


SHORT, STEPS = (recipes.get(f"{name}-digits").scaled(epochs=1) for name in ("quicknet", "adambnn"))


def test_the_folder_makes_the_network_again(tmp_path, one_thread):
    data = datasets.digits()
    result = fit(build, SHORT, data, tmp_path / "digits")
    found = models.from_pretrained(tmp_path / "digits")
    images = torch.stack([data.held_out[i][0] for i in range(8)])
    assert torch.equal(found(images), result.model(images))
    assert found.pretrained_config == build().pretrained_config  # the digits are no pictures

    labels = tuple("zero one two three four five six seven eight nine".split())
    data = replace(data, preprocessing=preprocessing.get("cifar").at(8), labels=labels)
    fit(build, SHORT, data, tmp_path / "pictures")
    config = models.from_pretrained(tmp_path / "pictures").pretrained_config
    assert config["preprocessing"] == {"name": "cifar", "size": 8}
    assert config["labels"] == list(labels)
    for file, rule in (("pictures/quicknet.safetensors", data.preprocessing),
                       ("digits/quicknet.safetensors", None), ("digits/metrics.csv", None)):
        assert preprocessing.recorded(tmp_path / file) == rule


def changed():
    model = build()
    model.pool = nn.AdaptiveMaxPool2d(1)
    return model


@pytest.mark.parametrize("make, recipe", [
    (lambda: nn.Sequential(build()), SHORT),
    (build, replace(STEPS, stages=STEPS.stages[:1]))],
    ids=["of a user", "with real weights"])
def test_networks_that_no_name_makes_again(tmp_path, make, recipe, one_thread):
    fit(make, recipe, datasets.digits(), tmp_path)
    assert not {"config.json", "model.safetensors"} & {*os.listdir(tmp_path)}


def test_a_changed_network_is_told(tmp_path, one_thread):
    with pytest.warns(UserWarning, match="no folder for from_pretrained: .*reactnet is not as "
                                         "create made it: pool is AdaptiveMaxPool2d"):
        fit(changed, SHORT, datasets.digits(), tmp_path)
    assert not {"config.json", "model.safetensors"} & {*os.listdir(tmp_path)}
