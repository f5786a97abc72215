"""A converted network against its model: mistakes are noticed, and the whole zoo has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn
from bitkernels import PackedTensor, models
from bitkernels.converter import compare, convert
from bitkernels.models.registry import entry, takes_image_size
from bitkernels_tests.converter.networks import conv, norm, shuffled
from bitkernels_tests.models.test_every_model import LARGE, SIZES


def network():
    """Signs of a real tensor with a shift, of a product by threshold, beside a real value, and of a
    batch norm with negative factors."""
    torch.manual_seed(0)
    return shuffled(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), bnn.RSign(32), conv(32, 32), norm(32), conv(32, 64),
        norm(64), bnn.BinaryResidualBlock(conv(64, 64), norm(64)),
        nn.BatchNorm2d(64), conv(64, 40), nn.Flatten(), bnn.BinaryLinear(40 * 64, 10)))


@pytest.fixture
def pair():
    model, x = network(), torch.randn(3, 3, 8, 8)
    return model, convert(model, x), x


def test_a_right_conversion(pair):
    model, converted, x = pair
    found = compare(model, converted, x)
    assert found.far == 0 and found.given_signs < 1e-5
    assert [p.name for p in found.products] + list(found.uncompared) == [
        p.name for p in converted.report.products]
    assert [p.signs for p in found.products[:2]] == [3 * 64 * 32] * 2
    assert "0 of them away from the threshold" in str(found)


@pytest.mark.parametrize("name, change", [
    ("1_shift", 0.5), ("2_weight_threshold", 9), ("7_running_mean_sign_shift", 0.5),
    ("4_weight_scale", 0.5), ("4_weight_bias", 0.5), ("4_weight", 1), ("10_weight", 1)])
def test_a_mistake_is_noticed(pair, name, change):
    model, converted, x = pair
    buffer = converted.graph_module.state_dict()[name]
    before = buffer.clone()
    buffer += change
    found = compare(model, converted, x)
    assert found.far or found.given_signs > 1e-4
    if "shift" in name or "threshold" in name:
        assert found.far and "0 of them away" not in str(found)
    buffer.copy_(before)
    found = compare(model, converted, x)
    assert found.far == 0 and found.given_signs < 1e-5


def test_signs_at_their_threshold_are_counted_apart(pair):
    model, _, x = pair
    model[0].weight.data[0] = 0
    model[0].bias.data[0] = 1e-7  # of values near 1
    model[1].shift.data[0] = 0
    converted = convert(model, x)
    assert compare(model, converted, x).products[0].different == 0
    shift = next(t for name, t in converted.graph_module.state_dict().items() if "1_shift" in name)
    shift[0] -= 1e-6
    found = compare(model, converted, x)
    assert found.products[0].different == 3 * 64 and found.far == 0
    assert found.given_signs < 1e-5 < found.largest


def test_groups_narrower_than_a_word():
    torch.manual_seed(0)
    model = shuffled(nn.Sequential(nn.Conv2d(3, 20, 3), conv(20, 8, groups=2)))
    x = torch.randn(2, 3, 8, 8)
    found = compare(model, convert(model, x), x)
    assert [(p.signs, p.far) for p in found.products] == [(2 * 20 * 36, 0)]
    assert found.given_signs < 1e-5 and not found.uncompared


class Several(nn.Module):
    """One binary convolution called three times, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 32, 3, padding=1), conv(32, 32)
        self.up, self.norm = bnn.BinaryConvTranspose2d(32, 32, 2, stride=2), norm(32)

    def forward(self, x):
        x = self.stem(x)
        early, late = self.shared(-x), self.shared(self.norm(self.shared(x)))
        return self.up(early + late.abs() + x)  # the first call moves behind what is added


def test_one_weight_in_several_products_and_transposed_ones():
    torch.manual_seed(0)
    model = shuffled(Several())
    x = torch.randn(2, 3, 8, 8)
    converted = convert(model, x)
    found = compare(model, converted, x)
    assert [p.name for p in found.products] == ["shared.weight"] * 3 + ["up.weight"]
    assert found.far == 0 and found.given_signs < 1e-5 and not found.uncompared
    name = next(n for n in converted.graph_module.state_dict() if "threshold" in n)
    converted.graph_module.get_buffer(name).add_(9)
    assert compare(model, converted, x).far


def test_words_that_the_model_makes_are_not_compared():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = bnn.pack(conv(32, 8))

        def forward(self, x):
            return self.conv(PackedTensor.from_real(x).max_pool2d(2))

    model, x = Pooled().eval(), torch.randn(2, 32, 8, 8)
    found = compare(model, convert(model, x), x)
    assert found.uncompared == ("conv.weight_words",) and not found.products
    assert found.largest == found.given_signs == 0


def test_a_model_in_training_is_compared_in_evaluation(pair):
    model, converted, x = pair
    mean = model.train()[3].running_mean.clone()
    found = compare(model, converted, x)
    assert found.far == 0 and found.given_signs < 1e-5
    assert model.training and torch.equal(model[3].running_mean, mean)


def test_another_model_is_refused(pair):
    _, converted, x = pair
    with pytest.raises(ValueError, match="compare: model must be the one that network was conv"):
        compare(nn.Sequential(nn.Conv2d(3, 4, 1), bnn.BinaryConv2d(4, 4, 1)), converted, x)
    with pytest.raises(ValueError, match="compare: network must be what bitkernels.convert"):
        compare(network(), network(), x)


def test_the_sign_of_zero_is_asked_for():
    class Signs(nn.Linear):
        def forward(self, input):
            return nn.functional.linear(input.sign(), self.weight.sign())

    model, x = Signs(32, 4), torch.randn(2, 32)
    converted = convert(model, x, sign_of_zero=1)
    assert compare(model, converted, x, sign_of_zero=1).far == 0
    with pytest.raises(ValueError, match="; give sign_of_zero=1 where convert got it$"):
        compare(model, converted, x)


@pytest.mark.every
@pytest.mark.parametrize("name", [name for name in models.list_models() if name not in LARGE])
def test_every_published_network(name):
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    sized = {"image_size": size} if takes_image_size(entry(name).build) else {}
    model = shuffled(models.create_model(name, **sized))
    images = torch.randn(2, 3, size, size)
    # DoReFa-Net's activations have two bits, its products stay real.
    found = compare(model, convert(model, images, sign_of_zero=1), images, sign_of_zero=1)
    assert found.given_signs < 1e-4 and found.far == 0, str(found)
    assert found.products or name == "dorefanet"
