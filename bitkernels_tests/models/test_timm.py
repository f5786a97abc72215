"""The networks in timm, and its absence."""

from __future__ import annotations

import sys

import pytest
import torch

from bitkernels import models


@pytest.fixture(scope="module")
def timm(torchvision):
    timm = pytest.importorskip("timm")
    import bitkernels.models.timm  # noqa: F401

    return timm


def test_every_network_is_registered(timm):
    assert set(models.list_models()) <= set(timm.list_models(module="timm"))
    model = timm.create_model("reactnet18", num_classes=7, in_chans=1, blocks=(1, 1, 1, 1))
    assert type(model) is models.ReActNet18 and model.num_classes == 7
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 40, 40)).shape == (1, 7)
    with pytest.raises(ValueError, match="reactnet18 has no option width; it has binary_weights"):
        timm.create_model("reactnet18", width=3)


def test_timm_finds_the_preprocessing(timm):
    from timm.data import resolve_model_data_config

    with torch.device("meta"):
        larq, cifar = (timm.create_model(name) for name in ("quicknet_small", "binarynet"))
    found = resolve_model_data_config(larq)
    assert found["input_size"] == (3, 224, 224) and found["interpolation"] == "bicubic"
    assert resolve_model_data_config(cifar)["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("classes, head", [(None, True), (5, False)])
def test_pretrained_loads_public_weights_by_their_name(timm, classes, head, monkeypatch):
    calls = []
    monkeypatch.setattr("bitkernels.models.weights.load_weights",
                        lambda model, name, head: calls.append((name, head)))
    with torch.device("meta"):
        timm.create_model("quicknet_small", pretrained=True, num_classes=classes)
        timm.create_model("quicknet_small.larq", pretrained=True, num_classes=classes)
        timm.create_model("quicknet_small", num_classes=classes)
    assert calls == [("quicknet_small", head), ("quicknet_small.larq", head)]
    with pytest.raises(ValueError, match="quicknet_small: cache_dir is not taken"):
        timm.create_model("quicknet_small", cache_dir="here")


def test_without_timm_the_command_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "bitkernels.models.timm", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        import bitkernels.models.timm  # noqa: F401
