"""Models as users write them: equal after conversion, or refused in one error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkernels.nn as bnn
from bitkernels.converter import convert
from bitkernels_tests.converter.networks import conv, norm, shuffled

pytestmark = pytest.mark.usefixtures("one_thread")


class Written(nn.Module):
    """A forward written as a function of the module and one input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Starred(Written):
    def forward(self, *xs):
        return self.function(self, *xs)


def image(function, cls=Written, **parts):
    """Of the values behind a stem, and a convolution `c` of them."""
    return cls(lambda s, x: function(s, s.stem(x)), stem=nn.Conv2d(3, 32, 3, padding=1),
               c=conv(32, 32, weight_scale=None), **parts)


def sequence(*layers):
    return nn.Sequential(bnn.BinaryLinear(48, 5), *layers)


X, S = (torch.randn(4, *sizes, generator=torch.Generator().manual_seed(0))
        for sizes in ((3, 8, 8), (5, 48)))
DOUBLES = nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64).view(32, 1, 1))
SHIFTS = nn.Parameter(torch.linspace(-0.5, 0.5, 32).view(1, 32, 1, 1))
TEN = nn.Parameter(torch.linspace(-1, 1, 10))
EQUAL = {
    "clamp_min": (image(lambda s, x: torch.clamp_min(s.c(x), 0.0)), X),
    "a factor of another type": (image(lambda s, x: s.c(x) * s.k, k=DOUBLES), X),
    "a residual of another type": (image(lambda s, x: s.c(x) + x.double()), X),
    "slopes of a sequence": (sequence(nn.PReLU(5)), S),
    "one slope of a sequence": (sequence(nn.PReLU()), S),
    "a norm of a sequence": (sequence(nn.BatchNorm1d(5)), S),
    "slopes of other channels": (nn.Sequential(bnn.BinaryLinear(48, 7), nn.PReLU(5)), S),
    "sequences side by side": (Written(
        lambda s, x: F.prelu(torch.cat([s.a(x), s.b(x)], 1), s.k), a=sequence(), b=sequence(),
        k=TEN), S),
    "a view of an image": (
        Written(lambda s, x: s.a(x.view(x.shape[0], -1)), a=nn.Linear(192, 2)), X),
    "a view of a product": (
        image(lambda s, x: s.a(F.relu_(s.c(x)).view(x.shape[0], -1)), a=nn.Linear(2048, 2)), X),
    "a random number": (
        image(lambda s, x: s.c(x) + 0 * torch.rand_like(s.c.weight[0, 0, 0, 0])), X),
    "an unbatched convolution": (Written(
        lambda s, x: F.conv2d(torch.where(x[0] >= 0, 1.0, -1.0), s.w),
        w=nn.Parameter(torch.ones(5, 3, 3, 3))), X),
    "signs of integers": (Written(
        lambda s, x: F.conv2d(torch.where(x.long() >= 0, 1.0, -1.0), s.w),
        w=nn.Parameter(torch.ones(5, 3, 3, 3))), X),
    "two norms, two signs": (image(
        lambda s, x: s.d(s.n(s.c(x))) + s.d(s.m(s.c(x))) + s.c(x), n=norm(32), m=norm(32),
        d=conv(32, 32)), X),
    "any number of inputs": (image(lambda s, x: s.c(x), Starred), X),
    "expanded vectors and gates": (image(
        lambda s, x: (s.c(x + s.k.expand_as(x)) * s.k.expand(x.shape) + x)
        * x.mean((2, 3), keepdim=True).sigmoid().expand_as(x), k=SHIFTS), X),
    "a number of another type expanded": (image(
        lambda s, x: s.c(x) * s.k.expand_as(x), k=nn.Parameter(DOUBLES[0, 0, 0].detach())), X),
    "autocast": (image(lambda s, x: _autocast(s, x)), X),
}


def _autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.c(x)


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name):
    model, x = shuffled(EQUAL[name][0]), EQUAL[name][1]
    converted = convert(model, x)
    for batch in (x, x[:1]):
        with torch.no_grad():
            expected, got = model(batch), converted(batch)
        assert got.dtype == expected.dtype
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if name == "autocast":
        assert "under a condition or autocast" in str(converted.report)
    if name == "a random number":
        assert dict(converted.report.others)["rand_like"] == 1


def test_dropout_does_not_stand_between():
    model = nn.Sequential(conv(3, 32), nn.Dropout(), norm(32), nn.Dropout2d(), conv(32, 5))
    report = convert(shuffled(model), X).report
    assert [(p.epilogue, p.writes) for p in report.products] == [(("threshold",), "words"),
                                                                 ((), "real")]


def test_signs_of_a_norm_written_with_real_numbers():
    normed = bnn.BinaryConv2d(32, 32, 3, padding=1, input_quantizer=bnn.NormSign(32, 2))
    model = shuffled(nn.Sequential(conv(3, 32), norm(32), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                                   normed, norm(32), nn.ReLU(inplace=True)))
    converted = convert(model, X)
    with torch.no_grad():
        assert torch.allclose(converted(X), model(X), atol=1e-3)
    left = dict(converted.report.others)
    assert left.keys() == {"contiguous", "bitkernels.sign_pack", "bitkernels.packed_max_pool2d"}


def test_one_of_the_inputs_is_no_batch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = conv(3, 32)

        def forward(self, x, factor, residual, power):
            return self.c(x * factor) * x.shape[2] ** power + residual

    model = shuffled(Scaled())
    x, factor, residual = X, torch.randn(1, 3, 1, 1), torch.randn(4, 32, 8, 8)
    converted = convert(model, (x, factor, residual, 2.0))
    with torch.no_grad():
        assert torch.allclose(converted(x[:3], factor, residual[:3], 2.0),
                              model(x[:3], factor, residual[:3], 2.0), atol=1e-3)
    for given, says in (
            ((x[..., :6], factor, residual, 2.0), r"x must be .*, 3, 8, 8\), .* \(4, 3, 8, 6\)"),
            ((x.double(), factor, residual, 2.0), "x must be float32 .* got float64"),
            ((x, factor, residual[:3], 2.0), r"residual must be .*\(4, 32, 8, 8\).*\(3, 32, 8, 8"),
            ((x, factor, residual, 3.0), "power must be 2.0"),
            ((x[0], factor, residual, 2.0), r"x must be .* got float32 of shape \(3, 8, 8\)"),
            ((1.0, factor, residual, 2.0), "x must be a tensor, got float"),
            ((x.to_sparse(), factor, residual, 2.0), "x must be a dense tensor, got sparse_coo"),
            ((x, factor), r"convert, \(\*, \*, \*, \*\), got \(\*, \*\)")):
        with pytest.raises(RuntimeError, match=says):
            converted(*given)


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Conv2d(3, 32, 3), conv(32, 32), nn.ReLU(), conv(32, 8)),
    lambda: nn.Sequential(bnn.BinaryConvTranspose2d(3, 8, 2, stride=2), nn.ReLU()),
    lambda: nn.Sequential(nn.Flatten(1), nn.Conv1d(3, 64, 3, padding=1), nn.BatchNorm1d(64))])
def test_one_image_without_a_batch(make):
    """Where channels come first, and a norm of two dimensions reads others than the convolution
    writes."""
    model, x = shuffled(make()), X[0]
    converted = convert(model, x, dynamic_shapes=({},))
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)


def test_sizes_that_are_fixed_stay():
    model = shuffled(Written(lambda s, x: s.c(x).reshape(1, -1), c=conv(3, 32)))
    converted = convert(model, X[:1], dynamic_shapes=({},))
    assert torch.allclose(converted(X[:1]), model(X[:1]))
    with pytest.raises(RuntimeError, match=r"must be float32 of shape \(1, 3, 8, 8\)"):
        converted(X)


def _count(model, x):
    return model.c(x) * model.k.add_(1)


def _normed():
    model = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    model(X)
    return model


def _data(model, x):
    model.w.weight.data = model.w.weight.data.sign()
    return model.w(x)


def _branch(model, x):
    return model.c(x) if model.k < 1e-7 else x


def _kept(model, x):
    model.seen.fill_(x.shape[0])
    return model.w(x)


def _numpy(model, x):
    return x.clamp(max=float(model.w.weight.numpy().max()))


class Uncopied(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise KeyError("inner")


REFUSED = {
    "a buffer that changes": (lambda: image(_count, k=nn.Buffer(torch.zeros(()))),
                              "must not change its buffers in evaluation, changes k"),
    "an input that changes": (lambda: Written(lambda s, x: x.add_(1)),
                              "must not change its inputs in evaluation, changes x"),
    "strides": (lambda: image(lambda s, x: x.as_strided((4, 2), (1, 2))), "calls as_strided"),
    "no copy": (_normed, r"cannot be copied .* call the model once under torch.no_grad\(\)"),
    "a script": (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), "must be the torch.nn.Module that"),
    "a fixed batch": (lambda: Written(lambda s, x: x.reshape(4, -1) * x.new_ones(4, 1)),
                      "where the first size of an input is always the same, say so by dynamic_sh"),
    "weights that are written": (lambda: Written(_data, w=nn.Linear(8, 3)), "write to .data of"),
    "a branch on a buffer": (lambda: image(_branch, k=nn.Buffer(torch.ones(1))),
                             "may branch on values of a tensor, .* leave the one that evaluation"),
    "a tensor that counts": (lambda: Written(_kept, w=nn.Linear(8, 3), seen=torch.zeros(1)),
                             "is mutated in the forward.*; leave out in evaluation what the model"),
    "NumPy": (lambda: Written(_numpy, w=nn.Linear(8, 3)), "the model computes with NumPy"),
    "no copy of a part": (lambda: nn.Sequential(Uncopied(3, 4, 3)),
                          r"Sequential cannot be copied \(copy.deepcopy: KeyError: 'inner'\)$"),
    "a part that is converted": (
        lambda: nn.Sequential(convert(conv(3, 3), X), nn.ReLU()), "convert: 0 is converted alread"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_refused(name):
    make, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        convert(make(), X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_types(dtype):
    model = shuffled(nn.Sequential(nn.Conv2d(3, 32, 3), norm(32), conv(32, 40), norm(40),
                                   bnn.RPReLU(40), conv(40, 8))).to(dtype)
    with torch.no_grad():
        expected, got = model(X.to(dtype)), convert(model, X.to(dtype))(X.to(dtype))
    assert got.dtype == dtype
    assert (got - expected).abs().double().mean() < 0.01 * expected.abs().double().mean()
