"""BinaryDenseNet: sizes as published, values of a plain forward at odd sizes, bad options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitkernels.models import BinaryDenseNet
from bitkernels.models.concat import DenseSection
from bitkernels.models.densenet import DenseLayer
from bitkernels_tests.models.plain import Layers
from bitkernels_tests.models.plain_densenet import densenet
from bitkernels_tests.models.recorded import image, layers_of, loaded
from bitkernels_tests.models.sizes import check_sizes
from bitkernels_tests.models.usable import check_usable


@pytest.mark.parametrize("name, keras, binary_macs, real_macs, packed_bytes", [
    ("binary_densenet28", 5_150_504, 3_587_383_296, 202_484_224, 4_241_312),
    ("binary_densenet37", 8_734_120, 4_506_808_320, 199_738_368, 5_382_304),
    ("binary_densenet37_dilated", 8_734_120, 7_774_470_144, 452_625_408, 5_382_304),
    ("binary_densenet45", 13_939_240, 6_430_556_160, 244_103_424, 7_703_968)])
def test_sizes_as_published(name, keras, binary_macs, real_macs, packed_bytes):
    check_sizes(name, keras, binary_macs, real_macs, packed_bytes)


@pytest.mark.parametrize("record, size, seed, counts, dilations", [
    ("binary_densenet37_dilated", (45, 37), 13, (6, 8, 12, 6), (1, 1, 2, 4)),
    ("binary_densenet28:small", (9, 14), 17, (6, 6, 6, 5), (1, 1, 1, 1))])
def test_values_of_the_plain_forward(record, size, seed, counts, dilations, tmp_path):
    small = record.endswith(":small")
    model = loaded(record, tmp_path, seed, **(dict(stem="cifar") if small else {}))
    weights, x = Layers(layers_of(record)[1], seed), image(seed, size)
    wanted = densenet(x.double(), weights, counts, dilations, small)
    assert weights.margin > 1.5e-6 and not weights.layers
    with torch.no_grad():
        error = (model(x) - wanted).abs().max()
    assert error <= 2e-5 * wanted.abs().max()


def test_a_small_one_does_what_every_network_must():
    check_usable(lambda: BinaryDenseNet(10, 1, layers=(1, 2), reduction=(2,), dilation=(1, 1),
                                        stem="cifar"), torch.randn(8, 1, 6, 6))


@pytest.mark.parametrize("grad", [False, True])
def test_a_section_appends_to_what_it_got(grad):
    section = DenseSection(DenseLayer(8), DenseLayer(72))
    x = torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        y = section(x)
    assert y.shape == (2, 136, 5, 4) and torch.equal(y[:, :8], x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    first = section[0].conv(nn.BatchNorm2d(8)(x))
    assert torch.equal(y[:, 8:72], first)
    assert torch.equal(y[:, 72:], section[1].conv(nn.BatchNorm2d(72)(torch.cat([x, first], 1))))


def test_images_too_small_are_named():
    for stem, side in (("imagenet", 29), ("cifar", 8)):
        model = BinaryDenseNet(2, 1, layers=(1, 1, 1, 1), stem=stem).eval()
        with torch.no_grad():
            assert model(torch.zeros(1, 1, side, side)).shape == (1, 2)
        message = rf"at least {side} pixels .*\(1, 1, {side - 1}, 40\)"
        with pytest.raises(RuntimeError, match=message):
            model(torch.zeros(1, 1, side - 1, 40))


@pytest.mark.parametrize("options, message", [
    (dict(layers=(1, 1)), r"layers=\(1, 1\), dilation=\(1, 1, 1, 1\) and reduction=\(2.7"),
    (dict(layers=(6, 0, 6, 5)), r"at least 1 .* got \(6, 0, 6, 5\)"),
    (dict(reduction=(2.7, 0, 2.2)), r"above 0, got .* and \(2.7, 0.0, 2.2\)"),
    (dict(stem="large"), "'imagenet', 'cifar', got 'large'"),
    (dict(reduction=(2.7, 99, 2.2)), r"reduction\[1\]=99.0 leaves none of 544 channels")])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        BinaryDenseNet(**options)
