"""SameConv2d: TensorFlow's padding at any stride, alone, in a block and packed."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels import nn as bnn
from bitkernels.nn.same import same_pads


@pytest.mark.parametrize("size, kernel, stride, dilation, pads", [
    (8, 3, 2, 1, (0, 1)), (7, 3, 2, 1, (1, 1)), (8, 3, 1, 1, (1, 1)), (1, 3, 2, 1, (1, 1)),
    (224, 7, 2, 1, (2, 3)), (224, 11, 4, 1, (3, 4)), (112, 3, 2, 1, (0, 1)), (5, 2, 2, 1, (0, 1)),
    (6, 3, 2, 2, (1, 2)), (6, 1, 3, 1, (0, 0))])
def test_pads_are_tensorflows(size, kernel, stride, dilation, pads):
    assert same_pads((size, size), (kernel,) * 2, (stride,) * 2, (dilation,) * 2) == pads * 2


def formula(layer: bnn.SameConv2d, x: torch.Tensor, pads: tuple[int, ...]) -> torch.Tensor:
    signs = F.pad(torch.where(x < 0, -1.0, 1.0), pads)
    scale = layer.weight.abs().mean((1, 2, 3), keepdim=True) if layer.weight_scale else 1.0
    weight = torch.where(layer.weight < 0, -1.0, 1.0) * scale
    return F.conv2d(signs, weight, layer.bias, layer.stride)


@pytest.mark.parametrize("height, width, pads", [
    (8, 8, (0, 1, 0, 1)), (7, 8, (0, 1, 1, 1)), (8, 5, (1, 1, 0, 1)), (3, 3, (1, 1, 1, 1))])
@pytest.mark.parametrize("scale", [None, "magnitude_aware"])
def test_layer_and_its_twin_are_the_formula(height, width, pads, scale):
    layer = bnn.SameConv2d(5, 4, 3, 2, weight_scale=scale)
    x = torch.randn(2, 5, height, width)
    expected = formula(layer, x, pads)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(bnn.pack(layer)(x), layer(x))
    assert layer(x[0]).shape == expected.shape[1:]


def test_real_quantizers_are_padded_after_them():
    layer = bnn.SameConv2d(3, 4, 5, 3, input_quantizer="ste_heaviside", bias=False)
    x = torch.randn(2, 3, 7, 8)
    weight = torch.where(layer.weight < 0, -1.0, 1.0)
    torch.testing.assert_close(
        layer(x), F.conv2d(F.pad((x > 0).float(), (1, 2, 2, 2)), weight, None, 3))


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (3, 4)])
def test_gradients_are_those_of_the_padded_signs(size):
    layer = bnn.SameConv2d(4, 6, 3, 2)
    x = torch.randn(2, 4, *size).mul(1.5).requires_grad_()
    signs, weight = (torch.where(t < 0, -1.0, 1.0).requires_grad_() for t in (x, layer.weight))
    rows, columns = ((1, 1) if side % 2 else (0, 1) for side in size)
    expected = F.conv2d(F.pad(signs, (*columns, *rows)), weight, layer.bias, 2)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(layer(x), (x, layer.weight), grad)
    wanted = torch.autograd.grad(expected, (signs, weight), grad)
    for value, gradient, of in zip(found, wanted, (x, layer.weight), strict=True):
        torch.testing.assert_close(value, gradient * (of.abs() <= 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (7, 8)])
def test_block_runs_fused_and_is_its_layers(size):
    conv = bnn.SameConv2d(4, 6, 3, 2, bias=False, weight_scale="detached")
    shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 6, 1))
    block = bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(6), shortcut=shortcut)
    x = torch.randn(3, 4, *size)
    results = []
    for fused in (True, False):
        block.fused = fused
        block.norm.reset_running_stats()
        image = x.clone().requires_grad_()
        assert (block.unfused(image) is None) == fused
        out = block(image)
        out.square().sum().backward()
        results.append((out, image.grad, conv.weight.grad.clone(), block.norm.running_var.clone()))
        conv.weight.grad = None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    block.fused = True
    block.eval()
    with torch.no_grad():
        packed = bnn.pack(block)
        assert type(packed.conv) is bnn.PackedSameConv2d and packed.unfused(x) is None
        assert torch.equal(packed(x), block(x))


def test_packed_file_round_trip(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(bnn.SameConv2d(3, 4, 3, 2))
    bnn.save_packed(bnn.pack(model), tmp_path / "m")
    x = torch.randn(1, 3, 6, 6)
    other = bnn.load_packed(tmp_path / "m", nn.Sequential(bnn.SameConv2d(3, 4, 3, 2)))
    with torch.no_grad():
        assert torch.equal(other(x), model.eval()(x))
    with pytest.raises(ValueError, match="padding"):
        bnn.load_packed(tmp_path / "m", nn.Sequential(bnn.BinaryConv2d(3, 4, 3, 2, 1)))


def test_every_attribute_can_be_read():
    """As inspect.getmembers and torch.jit.trace do."""
    layer, x = bnn.SameConv2d(4, 5, 3, 2).eval(), torch.randn(2, 4, 7, 8)
    for one in (layer, layer.pack()):
        assert dict(inspect.getmembers(one))["stride"] == (2, 2)
        traced = torch.jit.trace(nn.Sequential(one), (x,))
        assert torch.equal(traced(x), layer(x))


def test_real_values_are_padded_with_the_signs_asked_for():
    layer = bnn.SameConv2d(4, 5, 3, 2, input_quantizer="dorefa_quantizer")
    layer.pad_value, x = -1, torch.randn(2, 4, 8, 7)
    padded = F.pad(layer.input_quantizer(x), (1, 1, 0, 1), value=-1.0)
    wanted = F.conv2d(padded, layer.binary_weight(), layer.bias, 2)
    torch.testing.assert_close(layer(x), wanted)
