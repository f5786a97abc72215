"""Quantizers: values and gradients, against numbers worked out by hand and explicit autograd."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from bitkernels import quantizers
from bitkernels_tests import oracles
from bitkernels_tests.cases import DTYPES, FORMATS, reals

NAN, INF = math.nan, math.inf
POINTS = (-INF, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, INF)
SIGNS = (-1, -1, -1, -1, 1, 1, 1, 1, 1, 1)
CLIPPED = (0, 0, 1, 1, 1, 1, 1, 1, 0, 0)
ALL = ("ste_sign", "approx_sign", "swish_sign", "magnitude_aware_sign", "ste_heaviside", "ste_tern",
       "dorefa_quantizer")


def run(quantizer, points, dtype=torch.float32, device="cpu"):
    """Values, and gradients of their sum."""
    x = torch.tensor(points, dtype=dtype, device=device, requires_grad=True)
    y = quantizer(x)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    y.sum().backward()
    return y.detach().cpu(), x.grad.cpu()


def equal(actual, expected):
    expected = torch.tensor(expected, dtype=actual.dtype)
    assert torch.equal(actual.nan_to_num(99), expected.nan_to_num(99)), (actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer, points, values, grads", [
    (quantizers.SteSign(), POINTS, SIGNS, CLIPPED),
    (quantizers.SteSign(1.5), POINTS, SIGNS, (0, 1, 1, 1, 1, 1, 1, 1, 1, 0)),
    (quantizers.SteSign(0), POINTS, SIGNS, (0, 0, 0, 0, 1, 1, 0, 0, 0, 0)),
    (quantizers.SteSign(None), (*POINTS, NAN), (*SIGNS, 1), (1,) * 11),
    (quantizers.SteSign(), (NAN,), (1,), (0,)),
    (quantizers.ApproxSign(), POINTS, SIGNS, (0, 0, 0, 1, 2, 2, 1, 0, 0, 0)),
    (quantizers.SteHeaviside(), POINTS, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1), CLIPPED),
    (quantizers.SteHeaviside(0.5), (-1, -0.5, NAN, 0.5, 1), (0, 0, 0, 1, 1), (0, 1, 0, 1, 0)),
    (quantizers.SteTern(0.5), POINTS, (-1, -1, -1, -1, 0, 0, 1, 1, 1, 1), CLIPPED),
    (quantizers.SteTern(), (-1, -0.04, NAN, 0.04, 1), (-1, 0, 0, 0, 1), (1, 1, 0, 1, 1)),
    (quantizers.SteTern(0), (-1e-3, -0.0, 0.0, 1e-3), (-1, 0, 0, 1), (1, 1, 1, 1)),
    # 0.7 mean|x| = 0.7
    (quantizers.SteTern(ternary_weight_networks=True), (-2.0, -0.5, 0.5, 1.0), (-1, 0, 0, 1),
     (0, 1, 1, 1)),
    (quantizers.NoOp(1), POINTS[1:-1], POINTS[1:-1], (1,) * 8),
    # n = 3: 0.5 -> 1.5 -> 2 (half to even), 1/6 -> 0.5 -> 0
    (quantizers.DoReFa(), (-1, 0, 0.25, 0.5, 0.75, 1, 2), (0, 0, 1 / 3, 2 / 3, 2 / 3, 1, 1),
     (0, 1, 1, 1, 1, 1, 0)),
    (quantizers.DoReFa(1), (-1, 0.5, 0.75), (0, 0, 1), (0, 1, 1)),
    (quantizers.DoReFa(1, "weights"), (0.0,), (-1,), (1,)),
], ids=str)
def test_values_and_gradients(quantizer, points, values, grads, dtype, device):
    y, g = run(quantizer, points, dtype, device)
    equal(y, values)
    equal(g, grads)


def test_dorefa_weight_of_zero_is_a_third():
    # n / 2 = 1.5 rounds to 2, and 2 * (2 / 3) - 1 = 1 / 3 up to its own rounding.
    y, g = run(quantizers.DoReFa(2, "weights"), (0.0, 0.0))
    torch.testing.assert_close(y, torch.full((2,), 1 / 3), rtol=0, atol=1e-7)
    assert g.tolist() == [1, 1]


def test_threshold_of_ternary_is_not_rounded():
    # The nearest float32 below 0.05 is inside, 0.05 itself is not.
    threshold = torch.tensor(0.05)
    below = torch.nextafter(threshold, torch.tensor(0.0))
    y = quantizers.SteTern()(torch.stack([threshold, below, -below, -threshold]))
    assert y.tolist() == [1, 0, 0, -1]


def test_swish_gradient_in_closed_form():
    # At 0 it is beta. d/dx of 2 s(bx) (1 + bx (1 - s(bx))) - 1 with s the logistic function.
    for beta in (5.0, 2.0):
        points = [-1.0, -0.3, -0.0, 0.0, 0.1, 1.0]
        y, g = run(quantizers.SwishSign(beta), points, torch.float64)
        x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
        s = torch.sigmoid(beta * x)
        (2 * s * (1 + beta * x * (1 - s)) - 1).sum().backward()
        torch.testing.assert_close(g, x.grad)
        assert g[2] == beta and y.tolist() == [-1, -1, 1, 1, 1, 1]
    assert run(quantizers.SwishSign(), [1.0])[1] < 0
    assert run(quantizers.SwishSign(), [1e4, -1e4])[1].tolist() == [0, 0]


def test_magnitude_aware_sign_by_hand():
    x = torch.tensor([[0.5, -1.5], [-0.0, 0.0], [-4.0, 2.0]], requires_grad=True)
    y = quantizers.MagnitudeAwareSign()(x)
    assert y.tolist() == [[1, -1], [0, 0], [-3, 3]]
    (y * torch.tensor([[1.0, 2], [3, 4], [5, 6]])).sum().backward()
    assert x.grad.tolist() == [[1, 0], [0, 0], [0, 0]]
    x = torch.tensor([0.5, -2.0], requires_grad=True)
    y = quantizers.MagnitudeAwareSign(None)(x)  # a mean over no dimensions is |x|
    y.sum().backward()
    assert y.tolist() == [0.5, -2.0] and x.grad.tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match="at least one dimension"):
        quantizers.MagnitudeAwareSign()(torch.tensor(1.0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_weights_against_autograd(bits):
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    y = quantizers.DoReFa(bits, "weights")(x)
    n, t = 2**bits - 1, torch.tanh(z)
    unit = t / (2 * t.abs().max().item()) + 0.5
    expected = 2 * (torch.round(unit * n) / n) - 1
    assert torch.equal(y, expected.detach())
    grad = torch.randn_like(y)
    y.backward(grad)
    (2 * unit).backward(grad)
    torch.testing.assert_close(x.grad, z.grad)
    assert len(y.unique()) <= 2**bits and y.abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, clip, beta", [("ste_sign", 0.75, 0.0), ("ste_sign", None, 0.0),
                                              ("approx_sign", None, 0.0),
                                              ("swish_sign", None, 3.0)])
def test_signs_against_explicit_autograd(name, clip, beta, dtype, device):
    if name == "ste_sign":
        quantizer = quantizers.SteSign(clip)
    else:
        quantizer = quantizers.SwishSign(beta) if beta else quantizers.ApproxSign()
    base = reals(3, 37, 5, dtype=dtype, device=device)
    for x in (base, base.transpose(0, 1), base.unsqueeze(0).to(memory_format=torch.channels_last)):
        a, b = (x.detach().clone().requires_grad_() for _ in range(2))
        y, expected = quantizer(a), oracles.sign(b, name, clip, beta)
        assert torch.equal(y, expected)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        tolerance = {} if dtype in (torch.float32, torch.float64) else dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(a.grad, b.grad, **tolerance)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (7,), (33, 2)])
def test_any_shape(name, shape):
    if shape == () and name == "magnitude_aware_sign":
        return
    x = torch.randn(shape, requires_grad=True)
    y = quantizers.get(name)(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    with torch.no_grad():
        assert torch.equal(quantizers.get(name)(x), y)


def saved_bytes(function, x):
    total = 0

    def keep(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(x)
    return total


@pytest.mark.parametrize("name", ["ste_sign", "ste_heaviside", "ste_tern"])
def test_one_bit_is_saved_for_backward(name):
    x = torch.randn(4, 1024, requires_grad=True)
    assert saved_bytes(quantizers.get(name), x) == x.numel() // 8
    assert saved_bytes(quantizers.SteSign(None), x) == 0


@pytest.mark.parametrize("name", ("ste_sign", "ste_tern", "ste_heaviside"))
@pytest.mark.parametrize("grad_format", FORMATS, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_an_image_has_its_memory_format(format, grad_format, name):
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=format).requires_grad_()
    grad = torch.randn(x.shape).contiguous(memory_format=grad_format)
    (got,) = torch.autograd.grad(quantizers.get(name)(x), x, grad)
    assert got.stride() == x.stride()
    assert torch.equal(got, torch.where(x.abs() <= 1, grad, 0))


def test_second_derivative_is_refused():
    x = torch.randn(4, requires_grad=True)
    (g,) = torch.autograd.grad(quantizers.SteSign()(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@pytest.mark.parametrize("name", ALL)
def test_compiles_to_one_graph(name):
    quantizer = quantizers.get(name)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    a, b = (reals(5, 40).requires_grad_() for _ in range(2))
    b.data.copy_(a.data)
    ya, yb = compiled(a), quantizer(b)
    (ya * 3).sum().backward()
    (yb * 3).sum().backward()
    assert torch.equal(ya, yb) and torch.equal(a.grad, b.grad)


def test_defaults_and_precision():
    expected = {"ste_sign": (1, dict(clip_value=1.0)), "approx_sign": (1, {}),
                "swish_sign": (1, dict(beta=5.0)),
                "magnitude_aware_sign": (1, dict(clip_value=1.0)),
                "ste_heaviside": (1, dict(clip_value=1.0)),
                "ste_tern": (2, dict(threshold_value=0.05, ternary_weight_networks=False,
                                     clip_value=1.0)),
                "dorefa_quantizer": (2, dict(k_bit=2, mode="activations"))}
    for name, (precision, arguments) in expected.items():
        quantizer = quantizers.get(name)
        assert quantizer.precision == precision
        assert {key: getattr(quantizer, key) for key in arguments} == arguments
        assert all(f"{key}={value!r}" in repr(quantizer) for key, value in arguments.items())
        for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert repr(copied) == repr(quantizer)
            assert copied.precision == precision
    assert quantizers.DoReFa(5).precision == 5 and quantizers.NoOp(3).precision == 3


def test_only_signs_are_binary():
    binary = [name for name in ALL if quantizers.is_binary(quantizers.get(name))]
    assert binary == ["ste_sign", "approx_sign", "swish_sign"]
    assert quantizers.is_binary(None) and quantizers.is_binary(quantizers.NoOp(1))
    assert not quantizers.is_binary(quantizers.NoOp(32))
    assert not quantizers.is_binary(quantizers.DoReFa(1))  # 0 and 1
    assert not quantizers.is_binary(torch.tanh)

    def custom(x):
        return x

    custom.precision = 1
    assert quantizers.is_binary(custom)


def test_get():
    for name in ALL:
        cls = type(quantizers.get(name))
        assert isinstance(cls(), nn.Module)
        assert type(quantizers.get(cls.__name__)) is cls and type(quantizers.get(cls)) is cls
    module = quantizers.SteSign(1.25)
    assert quantizers.get(module) is module and quantizers.get(torch.tanh) is torch.tanh
    assert quantizers.get(None) is None
    for wrong in ("sign", "NoOp", 3, quantizers.NoOp):
        with pytest.raises(ValueError, match=r"ste_sign.*SteTern.*dorefa_quantizer"):
            quantizers.get(wrong)


@pytest.mark.parametrize("build", [
    lambda: quantizers.SteSign(-1), lambda: quantizers.SteSign(NAN),
    lambda: quantizers.MagnitudeAwareSign(-1), lambda: quantizers.SteHeaviside(-1),
    lambda: quantizers.SwishSign(0.0), lambda: quantizers.SwishSign(-5),
    lambda: quantizers.SwishSign(NAN), lambda: quantizers.SwishSign(INF),
    lambda: quantizers.SteTern(-0.1), lambda: quantizers.SteTern(clip_value=-1),
    lambda: quantizers.DoReFa(0), lambda: quantizers.DoReFa(2.0),
    lambda: quantizers.DoReFa(2, "kernel"), lambda: quantizers.NoOp(0)])
def test_wrong_arguments(build):
    with pytest.raises(ValueError, match="must be"):
        build()


def test_arguments_are_fixed():
    quantizer = quantizers.SteSign()
    with pytest.raises(AttributeError, match="clip_value is fixed"):
        quantizer.clip_value = 2.0


def test_dorefa_of_nothing_has_a_gradient(device):
    """As an input quantizer: an empty batch must not cut the layer off."""
    x = torch.empty(0, 3, device=device, requires_grad=True)
    quantizers.DoReFa(2, "weights")(x).sum().backward()
    assert x.grad.shape == (0, 3)
