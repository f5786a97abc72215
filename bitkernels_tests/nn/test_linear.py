"""BinaryLinear: forward exactly F.linear of the signs, gradients against autograd in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bitkernels import quantizers
from bitkernels.nn import BinaryLayer, BinaryLinear
from bitkernels_tests import oracles
from bitkernels_tests.cases import dyadic, reals, signed


def layer_of(device="cpu", **options):
    layer = BinaryLinear(67, 9, device=device, **options)
    with torch.no_grad():
        layer.weight.copy_(reals(9, 67, device=device))
        layer.bias.copy_(dyadic(9, device=device))
    return layer


@pytest.mark.parametrize("shape", [(67,), (1, 67), (5, 67), (2, 3, 4, 67), (0, 67)])
def test_forward_is_linear_of_signs(shape, device):
    layer, x = layer_of(device), reals(*shape, device=device)
    assert torch.equal(layer(x), F.linear(signed(x), signed(layer.weight), layer.bias))


@pytest.mark.parametrize("scale", [None, "detached", "magnitude_aware", "xnor"])
@pytest.mark.parametrize("input_quantizer", ["ste_sign", "approx_sign", None])
def test_gradients(input_quantizer, scale, device):
    layer = layer_of(device, input_quantizer=input_quantizer, weight_scale=scale)
    x = reals(2, 5, 67, device=device).requires_grad_()
    y = layer(x)
    grad = dyadic(*y.shape, device=device)
    y.backward(grad)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    alpha = w64.clamp(-1, 1) if scale == "xnor" else w64.detach()
    alpha = None if scale is None else alpha.abs().mean(1)
    weight = oracles.binary_weight(w64, alpha, scale_weight_grad=scale != "detached")
    expected = F.linear(oracles.sign(x64, input_quantizer or "identity"), weight, b64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-5)
    expected.backward(grad.double())
    for actual, wanted in ((x, x64), (layer.weight, w64), (layer.bias, b64)):
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=1e-5,
                                   atol=1e-6 * wanted.grad.abs().max().item())


@pytest.mark.parametrize("input_quantizer, weight_quantizer", [
    ("dorefa_quantizer", quantizers.DoReFa(2, "weights")), (quantizers.NoOp(32), "ste_sign"),
    ("ste_sign", "ste_tern"), ("ste_heaviside", None)], ids=str)
def test_other_quantizers_compute_on_reals(input_quantizer, weight_quantizer):
    layer = layer_of(input_quantizer=input_quantizer, weight_quantizer=weight_quantizer)
    x = reals(5, 67)
    weight = (quantizers.get(weight_quantizer) or signed)(layer.weight)
    assert not layer.on_bits
    assert torch.equal(layer(x), F.linear(quantizers.get(input_quantizer)(x), weight, layer.bias))


@pytest.mark.parametrize("base", (quantizers.SteSign, quantizers.ApproxSign,
                                  quantizers.SwishSign, quantizers.MagnitudeAwareSign))
@pytest.mark.parametrize("side", ("input_quantizer", "weight_quantizer"))
def test_a_subclass_of_a_sign_computes_what_it_says(side, base):
    """It may compute anything, so the operator does not put its parent's rule in its place."""
    class Shifted(base):
        def forward(self, x):
            return super().forward(x - 0.5)

    if side == "input_quantizer" and base is quantizers.MagnitudeAwareSign:
        pytest.skip("for weights alone")
    layer, x = layer_of(**{side: Shifted()}), reals(5, 67).requires_grad_()
    y = layer(x)
    y.backward(grad := dyadic(*y.shape))
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    operands = [Shifted()(t) if name == side else quantizers.SteSign()(t)
                for name, t in (("input_quantizer", x64), ("weight_quantizer", w64))]
    expected = F.linear(*operands, layer.bias.detach().double())
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad.double(), w64.grad, rtol=1e-5, atol=1e-4)
    if layer.pack_obstacle() is None:
        assert torch.equal(layer.pack()(x.detach()), y)


def test_constructor_and_state_dict_are_those_of_torch():
    torch.manual_seed(3)
    a = BinaryLinear(8, 6, False)
    torch.manual_seed(3)
    assert torch.equal(a.weight, nn.Linear(8, 6, False).weight) and a.bias is None
    a, b = BinaryLinear(8, 6), nn.Linear(8, 6)
    assert list(a.state_dict()) == list(b.state_dict())
    a.load_state_dict(b.state_dict())
    b.load_state_dict(BinaryLinear(8, 6).state_dict())
    assert isinstance(a, BinaryLayer) and isinstance(a, nn.Linear)
    assert repr(a) == ("BinaryLinear(in_features=8, out_features=6, bias=True, "
                       "input_quantizer=SteSign(clip_value=1.0), "
                       "weight_quantizer=SteSign(clip_value=1.0))")
    x = reals(4, 8)
    assert torch.equal(copy.deepcopy(a)(x), a(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    layer = layer_of(weight_scale="detached").to(dtype)
    x = reals(5, 67, dtype=dtype).requires_grad_()
    y = layer(x)
    dot = F.linear(signed(x).float(), signed(layer.weight).float())
    expected = dot * layer.weight.float().abs().mean(1) + layer.bias.float()
    assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype


def test_wrong_input_and_options():
    with pytest.raises(RuntimeError, match=r"bitkernels::binary_linear: input must be \(..., 67\)"):
        layer_of()(torch.randn(2, 66))
    with pytest.raises(ValueError, match="BinaryLinear: weight_scale must be one of"):
        BinaryLinear(4, 4, weight_scale="mean")
    with pytest.raises(TypeError):
        BinaryLinear(4, 4, pad_value=1)


def test_compiles_once_for_all_batches():
    torch._dynamo.reset()
    layer = layer_of(weight_scale="xnor")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (2, 3, 7):
        x = reals(batch, 67)
        torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, layer(x))
    assert counter.frame_count == 1
