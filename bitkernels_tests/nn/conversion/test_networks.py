"""binarize alone on torchvision's networks: each sees its image, untrained and in training."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn


def _vgg(models):
    """VGG-11, its classifier with fewer features."""
    model = models.vgg.VGG(models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True),
                           num_classes=10, init_weights=False)
    model.classifier[0] = nn.Linear(512 * 49, 32)
    model.classifier[3], model.classifier[6] = nn.Linear(32, 32), nn.Linear(32, 10)
    return model


NETWORKS = {
    "resnet18": lambda m: m.resnet18(num_classes=10),
    "vgg11_bn": _vgg,
    "mobilenet_v2": lambda m: m.mobilenet_v2(num_classes=10),
    "densenet121": lambda m: m.densenet121(num_classes=10),
    "shufflenet_v2": lambda m: m.shufflenet_v2_x0_5(num_classes=10),
    "regnet_y": lambda m: m.regnet_y_400mf(num_classes=10),
    "mnasnet": lambda m: m.mnasnet0_5(num_classes=10),
    "squeezenet": lambda m: m.squeezenet1_1(num_classes=10),
    "inception_v3": lambda m: m.inception_v3(num_classes=10, init_weights=False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_depends_on_the_image(name, torchvision, one_thread):
    model = NETWORKS[name](torchvision.models)
    size = 75 if name == "inception_v3" else 64
    if name == "inception_v3":  # its auxiliary head needs 299 pixels
        model.aux_logits, model.AuxLogits = False, None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of layers that stay real, of inputs with one sign
        bnn.binarize(model)
        for training in (False, True):
            with torch.no_grad():
                y = model.train(training)(images)
            assert not torch.equal(y[0], y[1])
    layers = [m for m in model.modules() if isinstance(m, bnn.BinaryLayer)]
    assert len(layers) >= 8
    if name in ("mobilenet_v2", "mnasnet"):
        assert not any(m.groups > 1 for m in layers)


def test_layers_of_einops_move_values_and_reduce_them():
    class Rearrange(nn.Module):
        def forward(self, x):
            return _opaque(x).flatten(2).transpose(1, 2)

    class Reduce(nn.Module):
        reduction = "max"

        def forward(self, x):
            return _opaque(x).amax(1)

    def _opaque(x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("no tensor")  # as einops does at a proxy
        return x

    for cls in (Rearrange, Reduce):
        cls.__module__ = "einops.layers.torch"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Rearrange(), nn.Linear(8, 8), nn.ReLU(),
                          Reduce(), nn.Linear(8, 8), nn.Linear(8, 2))
    reports: list = []
    bnn.binarize(model, report=reports.append)
    assert type(model[1]) is type(model[4]) is nn.PReLU and not reports[0].not_analysed
    assert list(reports[0].normalized) == ["6"] and "max pooling" in reports[0].normalized["6"]
