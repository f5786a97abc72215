"""Spellings of a sign in code on real numbers: which bits can say, and which not."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkernels.nn as bnn
from bitkernels.backends import cpu
from bitkernels.converter import convert
from bitkernels.converter.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(3, 32, 6, 8, generator=torch.Generator().manual_seed(0)).round(decimals=1)
EYE = torch.eye(32).mul(2).sub(1).view(32, 32, 1, 1)


class Binary(nn.Module):
    """A convolution with binary weights of what a function makes of the input, exactly 0 in some
    places; padded as options say."""

    def __init__(self, function, options):
        super().__init__()
        self.function, self.options = function, options
        weight = torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight.sign() * weight.abs().mean((1, 2, 3), keepdim=True))

    def forward(self, x):
        return F.conv2d(self.function(x), self.weight, **self.options)


def converted(function, options, **given):
    model = Binary(function, options).eval()
    network = convert(model, X, **given)
    for batch in (X, X[:1]):
        with torch.no_grad():
            wanted, got = model(batch), network(batch)
        assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    return network


def indexed(x):
    signs = torch.sign(x)
    signs[signs == 0] = 1
    return signs


def where_zero(x):
    signs = torch.sign(x)
    return torch.where(signs == 0, torch.tensor(1.0), signs)


def by_places(x):
    signs = torch.sign(x)
    signs[(signs == 0).long()] = 1
    return signs


def of_one_channel(x):
    return indexed(F.pad(x[:, :1], (1, 1, 1, 1))) * torch.full((1, 32, 8, 10), 0.5)


def plus_random(x):
    return (indexed(x) - torch.rand_like(x)) + torch.rand_like(x)


def shuffled(x):
    return x.reshape(-1, 2, 16, 6, 8).transpose(1, 2).reshape(-1, 32, 6, 8)


def padded(sign, value, *sizes):
    return lambda x: F.pad(sign(x), sizes or (1, 1, 2, 2), value=value)


SIGNS = {
    "zeros by where": (where_zero, {}),
    "zeros by where, of the value": (
        lambda x: torch.where(x == 0, torch.ones_like(x), torch.sign(x)), {}),
    "others by where": (lambda x: torch.where(x != 0, torch.sgn(x), 1.0), {}),
    "zeros by an index": (indexed, {}),
    "zeros by masked_fill": (lambda x: x.sign().masked_fill(x == 0, 1), {}),
    "zeros by a sum": (lambda x: x.sign() + (x == 0).float(), {}),
    "greater, zeros by a mask": (
        lambda x: torch.where(x > 0, 1.0, -1.0).masked_fill(x == 0, 1), {}),
    "integers": (lambda x: ((x < 0).int() * -2 + 1).float() * 1.0, {}),
    "twice": (lambda x: (x.sign() + 0.1).sign(), {}),
    "two comparisons": (lambda x: (x >= 0).float() - (x < 0).float(), {}),
    "a half less, twice": (lambda x: ((x >= 0).float() - 0.5) * 2, {}),
    "from one": (lambda x: 1 - 2 * (x < 0).float(), {}),
    "clamped": (lambda x: indexed(x).clamp(-1, 1), {}),
    "times a number": (lambda x: indexed(x) * 0.3, {"padding": 1}),
    "by a number below 0": (lambda x: -indexed(x) / 0.7, {"padding": 1}),
    "a number times, straight through": (
        lambda x: 0.5 * indexed(x) - x.clamp(-1, 1) + x.clamp(-1, 1), {"padding": 1}),
    "turned": (lambda x: indexed(x).transpose(2, 3), {"padding": 1}),
    "shuffled": (lambda x: shuffled(indexed(x)), {"padding": 1}),
    "the largest": (lambda x: F.max_pool2d(0.5 * indexed(x), 3, 2, 1), {"padding": 1}),
    "an integer of a fraction times": (
        lambda x: indexed(x) * torch.full_like(x, 1.7, dtype=torch.int32), {}),
    "a number of another type": (
        lambda x: ((x >= 0).type_as(x) * 2 - 1) * torch.full((1,), 0.3).type_as(x), {}),
    "of a ReLU": (lambda x: torch.where(x.relu() >= 0, 1.0, -1.0), {}),
    "padded with -1": (padded(indexed, -1.0), {"stride": 2}),
    "padded with 1": (padded(indexed, 1.0), {"dilation": 2}),
    "padded with 0": (padded(indexed, 0.0), {"padding": (1, 0)}),
    "along one dimension": (padded(indexed, -1.0, 1, 1), {}),
    "padded with its own": (padded(lambda x: -0.5 * indexed(x), 0.5), {}),
    "padded with -1, then with 0": (padded(indexed, -1.0), {"padding": 1}),
    "padded on one side": (padded(indexed, -1.0, 0, 1, 0, 1), {}),
    "cropped": (padded(indexed, 1.0, -1, -1, -1, -1), {"padding": 1}),
    "cropped twice": (
        lambda x: F.pad(-F.pad(indexed(torch.cat([x, x], 1)), (0, 0, 0, 0, 0, -32), value=1.0),
                        (-1, -1), value=-1.0), {"padding": 1}),
    "reflected": (lambda x: F.pad(indexed(x), (1, 1, 1, 1), mode="reflect"), {}),
    "of what is padded": (lambda x: indexed(F.pad(x, (1, 1, 1, 1))), {}),
    "of what is padded below 0": (lambda x: indexed(F.pad(x, (1, 1, 1, 1), value=-2.0)), {}),
    "of what is padded, then padded": (lambda x: indexed(F.pad(x, (1, 1, 1, 1))), {"padding": 1}),
}
IN_PYTORCH = ("cropped", "cropped twice", "reflected")  # which the engine does not have


@pytest.mark.parametrize("name", SIGNS)
def test_is_a_sign(name):
    function, options = SIGNS[name]
    network = converted(function, options)
    assert len(network.report.products) == 1
    assert dict(network.report.others).keys() <= {
        "contiguous", "bitkernels.sign_pack", "bitkernels.packed_max_pool2d", "pad", "transpose",
        "reshape", "sym_size", "relu", "cat"}
    if cpu.active() is not None and name not in IN_PYTORCH:
        assert isinstance(network.engine(X), Engine), network.engine(X)


def test_where_a_border_of_zeros_is_padding():
    """torch.sign of a border of zeros is 0, as what zero padding adds."""
    nonzero = X + (X == 0)
    model = Binary(lambda x: F.pad(x, (1, 1, 1, 1)).sign(), {"padding": 1}).eval()
    network = convert(model, nonzero, sign_of_zero=1)
    assert len(network.report.products) == 1
    with torch.no_grad():
        assert torch.allclose(network(nonzero), model(nonzero), atol=1e-4)


OFTEN_0 = "exactly 0 for many inputs"
OTHERS = {  # what stays real, whatever sign_of_zero is
    "of a ReLU": (lambda x: x.relu().sign(), f"of what relu gives, which is {OFTEN_0}"),
    "from 0 to 1": (lambda x: x.clamp(0, 1).sign(), f"of what clamp gives, which is {OFTEN_0}"),
    "hardtanh": (lambda x: F.hardtanh(x, 0, 1).sign(), OFTEN_0),
    "greater, of a ReLU": (lambda x: torch.where(x.relu() > 0, 1.0, -1.0), OFTEN_0),
    "of a pooled ReLU": (lambda x: F.max_pool2d(x.relu(), 3, 1, 1).sign(), OFTEN_0),
    "of steps": (lambda x: x.round().sign(), f"of what round gives, which is {OFTEN_0}"),
    "of a gate": (lambda x: (x * F.hardsigmoid(x)).sign(), OFTEN_0),
    "of two ReLUs": (lambda x: (x.relu() + (x - 1).relu()).sign(), OFTEN_0),
    "of parts": (lambda x: torch.cat([x[:, :16], x[:, 16:].relu()], 1).sign(), OFTEN_0),
    "of a border on one side": (lambda x: F.pad(x, (1, 0, 1, 1)).sign(), f"pad gives.*{OFTEN_0}"),
    "of two signs": (lambda x: ((x - 0.5).sign() + (x + 0.5).sign()).sign(),
                     f"of what add gives, which is {OFTEN_0}"),
    "of a product of signs": (lambda x: F.hardtanh(F.conv2d(indexed(x), EYE)).sign(),
                              f"of what a product of signs gives, which is {OFTEN_0}"),
    "padded between": (padded(indexed, 0.3), "a sign padded with 0.3"),
    "padded with 0 on one side": (padded(indexed, 0.0, 0, 1, 0, 1), "0 on one side more"),
    "another zero": (lambda x: x.sign().masked_fill(x == 0, 0.5), "a real layer"),
    "where others are 0": (lambda x: x.sign() + (x == 1).float(), "a real layer"),
    "where not 0": (lambda x: x.sign().masked_fill(x != 0, 1), "a real layer"),
    "the least": (lambda x: F.max_pool2d(-indexed(x), 3, 1, 1), "a real layer"),
    "half clamped": (lambda x: indexed(x).clamp(-0.5, 1), "a real layer"),
    "a factor for each image": (lambda x: x.sign() * x.abs().mean((1, 2, 3), keepdim=True),
                                "a sign times a factor that is computed from the input"),
    "a factor for each pixel": (
        lambda x: x.abs().mean(1, keepdim=True) * x.sign() - x.clamp(-1, 1) + x.clamp(-1, 1),
        "a sign times a factor that is computed from the input"),
    "a factor for each channel": (lambda x: x.sign() * EYE[0], "a sign times a factor for each"),
    "0 and 1": (lambda x: (x >= 0).float(), "a real layer"),
    "of one channel, expanded": (of_one_channel, "a real layer"),
    "whether, of a sign": (lambda x: (2 * (x >= 0).float() - 1).bool().float() * 1, "a real layer"),
    "halves cut off": (lambda x: ((x >= 0).float() - 0.5).int().float() * 2, "a real layer"),
    "bytes": (lambda x: ((x >= 0).byte() * 2 - 1).float() * 1, "a real layer"),
    "a difference of bytes": (lambda x: ((x > 0).byte() - (x < 0).byte()) * 0.5, "a real layer"),
    "times what is 0 in float32": (lambda x: indexed(x) * 1e-50, "a real layer"),
    "turned around": (lambda x: (x < 0).float() - (x > 0).float(), "a real layer"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_is_no_sign(name):
    function, says = OTHERS[name]
    report = converted(function, {}, sign_of_zero=1).report
    assert len(report.products) == (name == "of a product of signs")
    assert re.search(says, dict(report.real)["weight"])


@pytest.mark.parametrize("value, at_zero", [(-1, -1), (1, 1)])
@pytest.mark.parametrize("zeros", [lambda x: x == 0, lambda x: x.sign() == 0])
def test_zeros_filled_again(value, at_zero, zeros):
    """What is filled in last is the sign of 0, whatever stood there."""
    network = converted(lambda x: indexed(x).masked_fill(zeros(x), value), {})
    assert len(network.report.products) == (at_zero == 1)
    if at_zero == -1:
        assert re.search("sign of 0 is -1", dict(network.report.real)["weight"])


def test_a_default_device():
    model = Binary(SIGNS["by a number below 0"][0], {}).eval()
    chain = Binary(SIGNS["a half less, twice"][0], {}).eval()
    with torch.device("meta"):
        networks = [convert(m, X) for m in (model, chain)]
    assert all(len(n.report.products) == 1 for n in networks)


def test_random_numbers_are_never_equal():
    """Two draws do not cancel each other, as the two sides of a straight-through form."""
    network = convert(Binary(plus_random, {}).eval(), X)
    assert network.report.products == ()


def deep(x):
    for _ in range(60):
        x = torch.tanh(x + x)
    return x


def straight_through_twice(x):
    return torch.where(x >= 0, 1.0, -1.0) - deep(x) + deep(x)


def test_a_deep_estimator_that_is_computed_twice():
    """Each of its 60 sums has one call as both its parts: 2^60 ways to it."""
    assert converted(straight_through_twice, {}).report.products


def test_zeros_are_no_places():
    """An index of integers names images, where one of bools names the zeros."""
    model = Binary(by_places, {}).eval()
    network = convert(model, X)
    with torch.no_grad():
        assert torch.allclose(network(X), model(X), atol=1e-4)
    assert network.report.products == ()


def test_inputs_without_a_batch():
    """A convolution of one image has two sizes to pad, as one of a batch."""
    model = Binary(padded(indexed, 1.0, 1, 1), {"padding": (1, 0)}).eval()
    network = convert(model, X[0], dynamic_shapes=({},))
    with torch.no_grad():
        assert torch.allclose(network(X[0]), model(X[0]), atol=1e-4)


def test_weights_that_are_one_vector():
    class Model(nn.Module):
        def forward(self, x):
            return F.linear(indexed(x), torch.ones(8))

    network = convert(Model(), X)
    assert torch.equal(network(X), Model()(X)) and network.report.products == ()


class Layer(nn.Module):
    """A binary layer of what a function gives."""

    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, bnn.BinaryConv2d(32, 8, 3)

    def forward(self, x):
        return self.layer(self.function(x))


@pytest.mark.parametrize("factor, kept", [
    (0.3, set()), *((f, {"sign", "eq", "where", "mul"}) for f in (-1.0, 1e-50))])
def test_signs_that_a_binary_layer_takes(factor, kept):
    """It takes the sign of its input, whatever the factor above 0."""
    model = Layer(lambda x: where_zero(x) * factor).eval()
    network = convert(model, X)
    with torch.no_grad():
        assert torch.equal(network(X), model(X))
    assert set(dict(network.report.others)) == {"contiguous", "bitkernels.sign_pack"} | kept
