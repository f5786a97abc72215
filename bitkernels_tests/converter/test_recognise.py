"""Code that computes with signs on real numbers, as most research code does."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels.converter import compare, convert
from bitkernels_tests.converter.networks import conv, norm, shuffled

SIGNS = {
    "where": lambda x: torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x)),
    "where, scalars": lambda x: torch.where(x < 0, -1.0, 1.0),
    "where, a scalar": lambda x: torch.where(x >= 0, 1.0, torch.full_like(x, -1.0)),
    "a comparison": lambda x: (x >= 0).float() * 2 - 1,
    "straight through": lambda x: x + (torch.where(x >= 0, 1.0, -1.0) - x).detach(),
    "clipped": lambda x: (torch.where(x >= 0, 1.0, -1.0).detach() - x.clamp(-1, 1).detach()
                          + x.clamp(-1, 1)),
}
OTHERS = {
    "torch.sign": (torch.sign, r"torch.sign\(0\) is 0"),
    "sign, straight through": (lambda x: x + (x.sign() - x).detach(), r"torch.sign\(0\) is 0"),
    "greater": (lambda x: torch.where(x > 0, 1.0, -1.0), "its sign of 0 is -1"),
}


class Faked(nn.Module):
    """A convolution and a linear layer of signs, their weights signs times a factor."""

    def __init__(self, sign, scaled=True, **options):
        super().__init__()
        self.sign, self.scaled, self.options = sign, scaled, options
        self.weight = nn.Parameter(torch.randn(48, 32 // options.get("groups", 1), 3, 3))
        self.norm, self.last = norm(48), nn.Parameter(torch.randn(5, 48))

    def forward(self, x):
        weight = torch.sign(self.weight)
        if self.scaled:
            weight = weight * self.weight.abs().mean((1, 2, 3), keepdim=True)
        x = self.norm(F.conv2d(self.sign(x), weight, **self.options))
        return F.linear(self.sign(x.mean((2, 3))), self.last.sign())


def both(model, **options):
    model = shuffled(model)
    x = torch.randn(3, 32, 6, 6, generator=torch.Generator().manual_seed(2))
    converted = convert(model, x[:1], **options)
    with torch.no_grad():
        assert torch.allclose(converted(x), model(x), atol=1e-4, rtol=1e-4)
    return converted.report


@pytest.mark.parametrize("name", SIGNS)
def test_signs_are_recognised(name):
    report = both(Faked(SIGNS[name], padding=1))
    assert [(p.name, p.kind) for p in report.products] == [("weight", "conv2d"), ("last", "linear")]
    assert not report.real


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    report = both(Faked(SIGNS["where"], padding=padding, dilation=2))
    assert len(report.products) == 2 and not report.real


class Written(nn.Module):
    """A block as ReActNet's code has it: biases that are expanded, before a sign and a PReLU."""

    def __init__(self, channels):
        super().__init__()
        self.biases = nn.ParameterList(
            torch.linspace(-0.5, 0.5, channels).roll(i).view(1, channels, 1, 1) for i in range(3))
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.norm, self.act = norm(channels), nn.PReLU(channels)

    def moved(self, i, x):
        return x + self.biases[i].expand_as(x)

    def forward(self, x):
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True)
        y = F.conv2d(self.moved(0, x).sign(), scale * self.weight.sign(), padding=1)
        return self.moved(2, self.act(self.moved(1, self.norm(y) + x)))


def test_blocks_of_published_code_stay_packed():
    report = both(nn.Sequential(Written(32), Written(32)), sign_of_zero=1)
    steps = ("scale", "bias", "residual", "activation")
    assert [(p.reads, p.epilogue, p.writes) for p in report.products] == [
        ("signs", steps, "both"), ("words", steps, "real")]
    assert dict(report.others).keys() <= {"contiguous", "bitkernels.sign_pack"}


ADDED = {
    "a number": (lambda x, v: x - 0.25, True), "a tensor of one": (lambda x, v: x + v[:1], True),
    "in front": (lambda x, v: v.view(-1, 1, 1) + x, True),
    "a factor": (lambda x, v: torch.add(x, v.view(-1, 1, 1), alpha=2), False),
    "of the columns": (lambda x, v: x + v[:6], False),
    "from a number": (lambda x, v: 0.25 - x, True),
    "of another type": (lambda x, v: x + v.double().view(-1, 1, 1), False)}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_before_a_sign(name):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = conv(32, 8), nn.Parameter(torch.linspace(-1, 1, 32))

        def forward(self, x):
            return self.conv(ADDED[name][0](x, self.shift))

    left = dict(both(Added()).others)
    assert (not left.keys() & {"add", "sub", "rsub"}) == ADDED[name][1]


@pytest.mark.parametrize("name", OTHERS)
def test_another_sign_of_zero_is_said(name):
    sign, says = OTHERS[name]
    report = both(Faked(sign, stride=2, groups=2))
    assert not report.products and len(report.real) == 2
    for _, why in report.real:
        assert re.search(says, why)
    assert len(both(Faked(sign, scaled=False), sign_of_zero=1).products) == 2


class Of(nn.Module):
    """A convolution of signs with the weight that a function makes of the latent one."""

    def __init__(self, made, latent):
        super().__init__()
        self.made, self.weight = made, nn.Parameter(latent)

    def forward(self, x):
        return F.conv2d(SIGNS["where"](x), self.made(self.weight))


def latent(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


NEARLY = {  # (weight, products, what the report says)
    "within rounding": (lambda w: w.sign() * (1 + 3e-6 * w.cos()), 1, ""),
    "not within rounding": (lambda w: w.sign() * (1 + 3e-5 * w.cos()), 0, "near to one magnitude"),
    "within half a percent": (lambda w: w.sign() * (1 + 4e-3 * w.cos()), 0,
                              r"differ by up to [0-9.e-]+ of it"),
    "some are 0": (lambda w: w.sign() * (w > -1), 0, "some are 0"),
    "two magnitudes": (lambda w: w.sign() * (1 + (w > 0)), 0, "more than one magnitude a channel"),
    "a channel of zeros": (lambda w: w.sign() * (torch.arange(8) > 0).view(-1, 1, 1, 1), 1, ""),
    "not a number": (lambda w: w.sign().where(w > -1, torch.nan), 0, "more than one magnitude"),
    "from below 0 to above": (lambda w: torch.linspace(-3, 3, 288).view(1, 32, 3, 3).expand_as(w),
                              0, "more than one magnitude"),
    "a magnitude for each channel": (
        lambda w: w.sign() * torch.linspace(1e-3, 9, 8).view(-1, 1, 1, 1), 1, ""),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_binary(name):
    made, products, says = NEARLY[name]
    model, x = Of(made, latent(8, 32, 3, 3)), torch.randn(2, 32, 5, 5)
    network = convert(model, x)
    assert len(network.report.products) == products
    assert re.search(says, str(dict(network.report.real)))
    assert_close(network(x), model(x), 1e-5)


def assert_close(got, wanted, tolerance):
    """Relative to the largest."""
    wanted = wanted.detach().double()
    most = float(wanted.nan_to_num().abs().max())
    assert torch.allclose(got.double(), wanted, atol=tolerance * most, rtol=0, equal_nan=True)


def scaled(w):
    return w.abs().mean((1, 2, 3), keepdim=True) * w.sign()


STRAIGHT_THROUGH = {
    "as ReActNet's": lambda w: scaled(w).detach() - w.clamp(-1, 1).detach() + w.clamp(-1, 1),
    "in front": lambda w: w + (scaled(w) - w).detach(), "unscaled": lambda w: w.sign() - w + w}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STRAIGHT_THROUGH)
def test_straight_through_weights_are_what_goes_through(name, dtype):
    """Whatever rounding left of them: in half precision up to 1 % of the magnitude."""
    model = Of(STRAIGHT_THROUGH[name], (0.1 * latent(8, 32, 3, 3)).to(dtype))
    x = torch.randn(2, 32, 5, 5).to(dtype)
    network = convert(model, x)
    assert len(network.report.products) == 1
    exact = Of(torch.sign if name == "unscaled" else scaled, model.weight.data)(x)
    assert_close(network(x), exact, 4 * torch.finfo(dtype).eps)


def test_other_sums_of_weights_stay_as_they_are():
    for made in (lambda w: (w.sign() - w) + 2 * w, lambda w: torch.sub(w.sign(), w, alpha=2) + w,
                 lambda w: (w.sign() - 1e9 * w) + 1e9 * w):
        model, x = Of(made, latent(8, 32, 3, 3)), torch.randn(2, 32, 5, 5)
        network = convert(model, x)
        assert not network.report.products and torch.allclose(network(x), model(x), atol=1e-3)


def test_signs_of_what_is_no_sign():
    class Other(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values, self.weight = values, nn.Parameter(torch.ones(8, 32))

        def forward(self, x):
            return F.linear(self.values(x), self.weight)

    for values in (lambda x: torch.where(x >= 0, 1.0, 0.0),
                   lambda x: torch.where(x >= 1, 1.0, -1.0),
                   lambda x: torch.where(x >= 0, -1.0, 1.0), lambda x: (x >= 0).float() * 2 - 3,
                   lambda x: x + (torch.where(x >= 0, 1.0, -1.0) - 2 * x)):
        x = torch.randn(4, 32)
        model = Other(values)
        converted = convert(model, x)
        assert not converted.report.products
        assert torch.allclose(converted(x), model(x), atol=1e-5)


LATENT_ZEROS = {
    "sign": torch.sign, "scaled": scaled, **STRAIGHT_THROUGH,
    "centred": lambda w: (w - w.mean().round()).sign() * w.abs().mean()}
TERNARY = {
    "two signs": lambda w: ((w + 0.5).sign() + (w - 0.5).sign()).sign(),
    "few are 0": lambda w: ((w + 0.01).sign() + (w - 0.01).sign()).sign() * w.abs().mean(),
    "many are 0": lambda w: (w * (w.abs() > 0.5)).sign(),
    "a threshold": lambda w: w.sign() * (w.abs() > 0.5),
    "rounded": lambda w: w.round().clamp(-1, 1) / 3,
    "two comparisons": lambda w: (w > 0.5).float() - (w < -0.5).float()}


def with_zeros():
    weight = latent(8, 32, 3, 3)
    weight[0, 0] = 0.0
    weight[3, 5, 1, 2] = -0.0
    return weight


@pytest.mark.parametrize("name", LATENT_ZEROS)
def test_weights_that_are_exactly_0(name):
    """torch.sign gives 0 of them, as of values; the other weights stay what they were."""
    made, x = LATENT_ZEROS[name], torch.randn(2, 32, 5, 5)
    model = Of(made, with_zeros())
    network = convert(model, x)
    (_, why), = network.report.real
    assert not network.report.products and "some are 0, which no bit can say; convert(" in why
    assert torch.equal(network(x), model(x)) or torch.allclose(network(x), model(x), atol=1e-4)

    network = convert(model, x, sign_of_zero=1)
    assert len(network.report.products) == 1 and not network.report.real
    filled = Of(lambda w: torch.where(with_zeros() == 0, made(w).abs().amax((1, 2, 3), True),
                                      made(w)), with_zeros())
    assert_close(network(x), filled(x), 1e-5)
    assert torch.equal(model.weight, with_zeros())
    found = compare(model, network, x, sign_of_zero=1)
    assert found.far == 0


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_weights_stay_real(name):
    model, x = Of(TERNARY[name], with_zeros()), torch.randn(2, 32, 5, 5)
    network = convert(model, x, sign_of_zero=1)
    assert not network.report.products
    assert dict(network.report.real)["weight"] == (
        "its weights are signs, but some are 0, which no bit can say")
    assert torch.allclose(network(x), model(x), atol=1e-4)
