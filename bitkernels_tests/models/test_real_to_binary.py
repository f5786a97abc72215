"""The Real-to-Binary network: sizes, values of a plain forward at an odd size, bad options."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitkernels.models import RealToBinaryNet
from bitkernels.models.real_to_binary import RealToBinaryLayer
from bitkernels.train import recipes
from bitkernels.train.stages import configure
from bitkernels_tests.models.plain import Layers
from bitkernels_tests.models.plain_real_to_binary import real_to_binary
from bitkernels_tests.models.recorded import image, layers_of, loaded
from bitkernels_tests.models.sizes import check_sizes
from bitkernels_tests.models.usable import check_usable

SMALL = dict(num_classes=10, in_channels=1, blocks=(1, 1), channels=(16, 32), stem="cifar")


def test_sizes_as_published():
    check_sizes("real_to_binary_net", 11_995_624, 1_676_279_808, 138_087_936, 5_378_976)


def test_values_of_the_plain_forward(tmp_path):
    seed, size = 4, (45, 37)
    model = loaded("real_to_binary_net", tmp_path, seed)
    weights, x = Layers(layers_of("real_to_binary_net")[1], seed), image(seed, size)
    wanted = real_to_binary(x.double(), weights, (False,) * 4 + ((True,) + (False,) * 3) * 3)
    assert weights.margin > 1.5e-6 and not weights.layers
    with torch.no_grad():
        error = (model(x) - wanted).abs().max()
    assert error <= 2e-5 * wanted.abs().max()


def test_a_small_one_does_what_every_network_must():
    check_usable(lambda: RealToBinaryNet(**SMALL), torch.randn(8, 1, 7, 6))


def test_the_gate_depends_on_the_image():
    layer = RealToBinaryLayer(64, 64).eval()
    x = torch.randn(2, 64, 5, 4)
    gates = layer.gate(x)
    assert gates.shape == (2, 64, 1, 1) and gates.min() > 0 and gates.max() < 1
    assert not torch.equal(gates[0], gates[1])
    with torch.no_grad():
        layer.act.weight.fill_(0.25)
        y = layer.norm(x)
        y = torch.nn.functional.leaky_relu(layer.conv(y) * layer.gate(y), 0.25)
        torch.testing.assert_close(layer(x), y + x)


def test_attention_layers_are_the_eight_blocks_of_the_recipe():
    with torch.device("meta"):
        model = RealToBinaryNet()
    assert model.attention_layers == tuple(f"blocks.{i}" for i in range(8))
    modules = dict(model.named_modules())
    assert all(name in modules for name in model.attention_layers)


def test_the_recipe_makes_its_signs_real():
    first = recipes.get("real-to-binary").stages[0]
    assert first.activations == "tanh" and first.weights == "real"
    model = RealToBinaryNet(**SMALL)
    configure(model, dataclasses.replace(first))
    x = torch.randn(4, 1, 7, 6, requires_grad=True)
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    layer = model.blocks[0][0]
    with torch.no_grad():
        y = torch.randn(2, 16, 5, 4)
        expected = torch.conv2d(y.tanh(), layer.conv.weight, padding=1)
        torch.testing.assert_close(layer.conv(y), expected)


@pytest.mark.parametrize("options, message", [
    (dict(blocks=(1, 1)), r"blocks=\(1, 1\) and channels=\(64, 128, 256, 512\)"),
    (dict(blocks=(1, 0), channels=(8, 16)), "at least 1"),
    (dict(blocks=(1, 1), channels=(16, 20)), r"multiples of 8, got \(16, 20\)"),
    (dict(blocks=(1, 1), channels=(16, 16)), r"different multiples of 8, got \(16, 16\)"),
    (dict(stem="large"), "'imagenet', 'cifar', got 'large'")])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        RealToBinaryNet(**options)
