"""What a CUDA graph asks of a training step, seen in its trace on meta tensors: nothing is made on
the CPU, and no value is read, which a trace without values could not go past."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import bitkernels.nn as bnn
from bitkernels.nn import pool


def parts(**kw):
    conv = bnn.BinaryConv2d(64, 64, 3, padding=1, bias=False, input_quantizer=None, **kw)
    return bnn.RSign(64, "ste_sign"), conv, nn.BatchNorm2d(64), bnn.RPReLU(64)


def block(**kw):
    sign, conv, norm, act = parts(**kw)
    return bnn.BinaryResidualBlock(conv, norm, sign=sign, act=act)


MODULES = {
    "block": block,
    "block with a scale": lambda: block(weight_scale="detached"),
    "layers": lambda: nn.Sequential(*parts()),
    "layers with a trained scale": lambda: nn.Sequential(*parts(weight_scale="xnor")),
    "pooling": lambda: bnn.MaxPool2d(3, 2, 1),
    "pooling on a GPU": lambda: bnn.MaxPool2d(3, 2, 1),
    "linear": lambda: bnn.BinaryLinear(16, 16),
    "transposed": lambda: bnn.BinaryConvTranspose2d(64, 64, 3, 2),
    "approx_sign": lambda: bnn.BinaryConv2d(64, 64, 3, input_quantizer="approx_sign"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_step_makes_nothing_on_the_cpu(name, monkeypatch):
    if name == "pooling on a GPU":
        monkeypatch.setattr(pool, "_on_gpu", lambda t: True)
    model = MODULES[name]().to("meta")
    x = torch.empty(4, 64, 16, 16, device="meta").to(memory_format=torch.channels_last)
    x.requires_grad_()

    def step(x, parameters, buffers):
        y = torch.func.functional_call(model, {**parameters, **buffers}, (x,))
        return y, torch.autograd.grad(y.sum(), [x, *parameters.values()])

    graph = make_fx(step)(x, dict(model.named_parameters()), dict(model.named_buffers()))
    made = [node for node in graph.graph.nodes if node.op == "call_function"]
    values = [(node.name, value) for node in made for value in torch.utils._pytree.tree_leaves(
        node.meta.get("val")) if isinstance(value, torch.Tensor)]
    assert len(values) > 10 or name.startswith("pooling")
    assert {value.device.type for _, value in values} == {"meta"}, values
    constants = [t for _, t in graph.named_buffers()]
    assert all(t.device.type == "meta" for t in constants), constants
