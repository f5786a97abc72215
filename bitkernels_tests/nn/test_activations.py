"""RSign and RPReLU: the equations of ReActNet, gradients against autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from bitkernels import quantizers
from bitkernels.nn import BinaryConv2d, RPReLU, RSign
from bitkernels_tests import oracles
from bitkernels_tests.cases import dyadic, reals

SHAPES = [(3, 5), (2, 5, 4), (2, 5, 3, 4), (2, 5, 2, 3, 2), (0, 5, 3, 3)]


def columns(vector, x):
    return vector.view(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantizer, conf", [
    ("approx_sign", ("approx_sign",)), ("ste_sign", ("ste_sign", 1.0)),
    (quantizers.SteSign(0.5), ("ste_sign", 0.5)), (quantizers.SteSign(None), ("ste_sign", None)),
    (quantizers.SwishSign(3.0), ("swish_sign", None, 3.0))], ids=str)
def test_rsign(quantizer, conf, shape, device):
    layer = RSign(5, quantizer, device=device)
    layer.shift.data = dyadic(5, device=device)
    x = dyadic(*shape, device=device).requires_grad_()
    y = layer(x)
    x64, s64 = (t.detach().double().requires_grad_() for t in (x, layer.shift))
    expected = oracles.sign(x64 + columns(s64, x), *conf)
    assert torch.equal(y.double(), expected)
    grad = dyadic(*shape, device=device)
    y.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.shift.grad.double(), s64.grad, rtol=1e-5, atol=1e-4)


def test_rsign_of_zero_is_plus_one():
    layer = RSign(2)
    layer.shift.data = torch.tensor([-0.5, 0.0])
    y = layer(torch.tensor([[0.5, -0.0], [0.25, float("nan")]]))
    assert y.tolist() == [[1, 1], [-1, 1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_rprelu(shape, device):
    layer = RPReLU(5, device=device)
    for p in layer.parameters():
        p.data = dyadic(5, device=device)
    x = dyadic(*shape, device=device).requires_grad_()
    y = layer(x)
    leaves = [t.detach().double().requires_grad_()
              for t in (x, layer.shift_in, layer.slope, layer.shift_out)]
    shifted = leaves[0] + columns(leaves[1], x)
    expected = F.prelu(shifted, leaves[2]) + columns(leaves[3], x)
    assert torch.equal(y.double(), expected)
    grad = dyadic(*shape, device=device)
    y.backward(grad)
    expected.backward(grad.double())
    for actual, leaf in zip((x, layer.shift_in, layer.slope, layer.shift_out), leaves, strict=True):
        assert torch.equal(actual.grad.double(), leaf.grad)


def test_first_values_and_keys():
    sign, prelu = RSign(4), RPReLU(4)
    assert {k: v.tolist() for k, v in sign.state_dict().items()} == {"shift": [0] * 4}
    assert {k: v.tolist() for k, v in prelu.state_dict().items()} == {
        "shift_in": [0] * 4, "slope": [0.25] * 4, "shift_out": [0] * 4}
    x = reals(3, 4)
    assert torch.equal(prelu(x), F.prelu(x, torch.tensor([0.25])))
    assert RPReLU(4, 0.5).slope.tolist() == [0.5] * 4
    with torch.no_grad():
        for p in (*sign.parameters(), *prelu.parameters()):
            p.fill_(7)
    sign.reset_parameters()
    prelu.reset_parameters()
    assert sign.shift.tolist() == [0] * 4 and prelu.slope.tolist() == [0.25] * 4
    assert repr(sign) == "RSign(4, quantizer=ApproxSign())"
    assert repr(prelu) == "RPReLU(4, init=0.25)"


def test_dtypes_meta_and_copies():
    x = reals(2, 4, 3)
    for layer in (RSign(4, dtype=torch.bfloat16), RPReLU(4, dtype=torch.bfloat16)):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    for layer in (RSign(4, device="meta"), RPReLU(4, device="meta")):
        assert layer(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("quantizer", [None, "ste_tern", torch.sign, "dorefa_quantizer"])
def test_rsign_takes_sign_quantizers_only(quantizer):
    with pytest.raises(ValueError, match="RSign: quantizer must be ste_sign, approx_sign"):
        RSign(4, quantizer)


def test_wrong_input():
    for layer in (RSign(4), RPReLU(4)):
        with pytest.raises(RuntimeError, match="bitkernels::r"):
            layer(torch.randn(2, 3))


def test_reactnet_block_compiles_to_one_graph():
    """RSign, a binary convolution of -1 and +1, RPReLU; against the same in plain autograd."""
    block = torch.nn.Sequential(
        RSign(5), BinaryConv2d(5, 5, 3, padding=1, bias=False, input_quantizer=None,
                               weight_scale="detached"), RPReLU(5))
    for p in block.parameters():
        p.data = torch.randn(p.shape)
    x = torch.randn(2, 5, 6, 6)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    sign, conv, prelu = ({k: p.detach().double().requires_grad_() for k, p in m.named_parameters()}
                         for m in block)
    z = oracles.sign(x.double() + columns(sign["shift"], x), "approx_sign")
    scale = conv["weight"].detach().abs().mean((1, 2, 3))
    weight = oracles.binary_weight(conv["weight"], scale, scale_weight_grad=False)
    z = oracles.rprelu(F.conv2d(z, weight, padding=1), prelu["shift_in"], prelu["slope"],
                       prelu["shift_out"])
    z.sum().backward()
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)
    for module, leaves in zip(block, (sign, conv, prelu), strict=True):
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.grad.double(), leaves[name].grad, rtol=1e-4, atol=1e-4)
