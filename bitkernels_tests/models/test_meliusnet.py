"""MeliusNet: sizes as published, values of a plain forward at an odd size, bad options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitkernels.models import MeliusNet, load_weights
from bitkernels.models.concat import DenseSection
from bitkernels.models.meliusnet import MeliusNetBlock
from bitkernels_tests.models.plain import Layers
from bitkernels_tests.models.plain_densenet import meliusnet
from bitkernels_tests.models.recorded import image, layers_of, loaded, write_h5
from bitkernels_tests.models.sizes import check_sizes
from bitkernels_tests.models.usable import check_usable


def test_sizes_as_published():
    check_sizes("meliusnet22", 6_944_584, 4_624_220_160, 136_388_608, 4_065_568, norm_values=2)


def test_values_of_the_plain_forward(tmp_path):
    seed, size = 17, (45, 37)
    model = loaded("meliusnet22", tmp_path, seed)
    weights, x = Layers(layers_of("meliusnet22")[1], seed), image(seed, size)
    wanted = meliusnet(x.double(), weights, (4, 5, 4, 4))
    assert weights.margin > 1.5e-6 and not weights.layers
    with torch.no_grad():
        error = (model(x) - wanted).abs().max()
    assert error <= 2e-5 * wanted.abs().max()


def test_a_small_one_does_what_every_network_must():
    check_usable(lambda: MeliusNet(10, 1, blocks=(1, 1), features=(32,)), torch.randn(8, 1, 18, 20))


def test_the_improvement_block_changes_the_last_64_channels():
    section = DenseSection(MeliusNetBlock(40))
    x = torch.randn(2, 40, 5, 4).contiguous(memory_format=torch.channels_last)
    y, block = section(x), section[0]
    assert y.is_contiguous(memory_format=torch.channels_last)
    new = block.conv1(nn.BatchNorm2d(40)(x))
    wanted = torch.cat([x, new], 1)
    wanted[:, 40:] += block.conv2(nn.BatchNorm2d(104)(wanted.clone()))
    assert torch.equal(y, wanted)


def test_a_file_without_one_of_the_groups_is_refused(tmp_path):
    model = MeliusNet(1000)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layers = [layer for layer in layers_of("meliusnet22")[1]
              if layer[0] != "stem_s2_groupconv_conv7"]
    write_h5(tmp_path / "weights.h5", layers, 0)
    with pytest.raises(ValueError, match="stem.7 .* against beta, gamma, moving_mean"):
        load_weights(model, tmp_path / "weights.h5")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_every_size_works():
    model = MeliusNet(3, 1, blocks=(1, 1, 1), features=(32, 32)).eval()
    for size in ((1, 1), (2, 5), (17, 3)):
        assert model(torch.zeros(1, 1, *size)).shape == (1, 3)
    one = MeliusNet(3, 1, blocks=(1,), features=()).eval()
    assert one(torch.zeros(1, 1, 5, 5)).shape == (1, 3)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"blocks=\(1, 1\) and features=\(160, 224, 256\)"):
        MeliusNet(blocks=(1, 1))
    with pytest.raises(ValueError, match=r"at least 1.* got blocks=\(0, 1\)"):
        MeliusNet(blocks=(0, 1), features=(8,))
