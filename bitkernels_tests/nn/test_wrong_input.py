"""Inputs with the wrong number of channels: every error blames the input and says both numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn


def block(**kw):
    conv = bnn.BinaryConv2d(16, 16, 3, padding=1, bias=False, input_quantizer=None)
    return bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(16), sign=bnn.RSign(16),
                                   act=bnn.RPReLU(16), **kw)


def unfused():
    made = block()
    made.fused = False
    return made


LAYERS = {
    "conv2d": (lambda: bnn.BinaryConv2d(16, 8, 3), (1, 8, 5, 5)),
    "conv2d more": (lambda: bnn.BinaryConv2d(16, 8, 3), (2, 17, 5, 5)),
    "conv2d unbatched": (lambda: bnn.BinaryConv2d(16, 8, 3), (8, 5, 5)),
    "conv2d groups": (lambda: bnn.BinaryConv2d(16, 8, 3, groups=4), (1, 9, 5, 5)),
    "conv2d depthwise": (lambda: bnn.BinaryConv2d(16, 16, 3, groups=16), (1, 8, 5, 5)),
    "conv2d same": (lambda: bnn.BinaryConv2d(16, 8, 3, padding="same"), (1, 8, 5, 5)),
    "conv2d reflect": (lambda: bnn.BinaryConv2d(16, 8, 3, padding=1, padding_mode="reflect"),
                       (1, 8, 5, 5)),
    "conv2d real": (lambda: bnn.BinaryConv2d(16, 8, 3, input_quantizer="dorefa_quantizer"),
                    (1, 8, 5, 5)),
    "conv1d": (lambda: bnn.BinaryConv1d(16, 8, 3), (1, 8, 5)),
    "conv1d unbatched": (lambda: bnn.BinaryConv1d(16, 8, 3), (8, 5)),
    "conv3d": (lambda: bnn.BinaryConv3d(16, 8, 3), (1, 8, 5, 5, 5)),
    "linear": (lambda: bnn.BinaryLinear(16, 8), (3, 8)),
    "packed conv2d": (lambda: bnn.BinaryConv2d(16, 8, 3).pack(), (1, 8, 5, 5)),
    "packed conv1d": (lambda: bnn.BinaryConv1d(16, 8, 3).pack(), (1, 8, 5)),
    "packed linear": (lambda: bnn.BinaryLinear(16, 8).pack(), (3, 8)),
    "rsign": (lambda: bnn.RSign(16), (1, 8, 5, 5)),
    "rprelu": (lambda: bnn.RPReLU(16), (1, 8, 5, 5)),
    "block": (block, (2, 8, 5, 5)),
    "block unfused": (unfused, (2, 8, 5, 5)),
    "block eval": (lambda: block().eval(), (2, 8, 5, 5)),
    "block shortcut": (lambda: block(shortcut=nn.Identity()), (2, 24, 5, 5)),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_input_is_blamed(name, grad):
    make, shape = LAYERS[name]
    layer = make()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as caught:
        layer(torch.randn(shape))
    text = str(caught.value)
    subject = text.partition(" must be ")[0].split(": ")[-1]
    assert subject == "input" or "expected input" in text  # PyTorch's words for real layers
    # Padded by a mode, the image is larger; PyTorch's words name the channels.
    channels = shape[1] if len(shape) > 3 else shape[0]
    assert "16" in text and (", ".join(map(str, shape)) in text or f"{channels} channels" in text)
    assert text.count("\n") == 0
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())


def test_a_whole_network_names_the_operator():
    net = nn.Sequential(nn.Conv2d(3, 12, 3), bnn.BinaryConv2d(16, 8, 3))
    with pytest.raises(RuntimeError, match=r"binary_conv2d: input must be 16 channels wide for a "
                       r"weight of shape \(8, 16, 3, 3\), got 12 channels in float32"):
        net(torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("name", ["conv2d", "conv2d same", "linear", "rsign", "rprelu", "block",
                                  "packed conv2d", "packed linear"])
def test_tensors_that_are_not_dense_are_named(name):
    make, shape = LAYERS[name]
    x = torch.randn(2, 16, *shape[2:])
    with pytest.raises(RuntimeError, match="input must be a dense tensor, got one of layout "
                       "torch.sparse_coo"):
        make()(x.to_sparse())
    with pytest.raises(RuntimeError, match="input must be float32, float16, .*got complex64 of"):
        make()(x.to(torch.complex64))


@pytest.mark.parametrize("name", ["conv2d", "linear", "rsign"])
def test_nested_tensors_are_named(name):
    make, shape = LAYERS[name]
    x = torch.nested.nested_tensor([torch.randn(16, *shape[2:])] * 2)
    with pytest.raises(RuntimeError, match="input must be a dense tensor, got a nested one"):
        make()(x)
