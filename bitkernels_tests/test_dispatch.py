"""What the kernels of the Autograd key share: saved tensors that hooks compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitkernels.nn as bnn
from bitkernels import quantizers
from bitkernels._dispatch import FirstOrder
from bitkernels.models import concat

# One module for each Function of first order, alone, so that it is the first to unpack.
MODULES = {
    "a straight-through quantizer": quantizers.SteSign,
    "the sign of approx_sign and swish_sign": quantizers.ApproxSign,
    "rsign": lambda: bnn.RSign(8),
    "rprelu": lambda: bnn.RPReLU(8),
    "binary_conv2d": lambda: bnn.BinaryConv2d(8, 8, 3, padding=1),
    "binary_conv_transpose2d": lambda: bnn.BinaryConvTranspose2d(8, 8, 3),
    "binary_linear": lambda: nn.Sequential(nn.Flatten(), bnn.BinaryLinear(8 * 36, 5)),
    "binary_residual_block": lambda: bnn.BinaryResidualBlock(
        bnn.BinaryConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), act=bnn.RPReLU(8)),
    "batch norm of a concatenation": lambda: _Concatenated(),
}


class _Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        return concat.norm_of_concatenated(self.norm, (x, 2 * x))


def test_every_function_is_here():
    assert {f.operator for f in FirstOrder.__subclasses__()} == set(MODULES)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_checkpoint_computes_the_gradients_of_the_module(name, create_graph):
    """Its hook computes with autograd, and hands out each tensor a single time."""
    module = MODULES[name]()
    start, grads = torch.randn(2, 8, 6, 6), []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        x = start.clone().requires_grad_()
        out = call(x)
        leaves = [x, *module.parameters()]
        grads.append(torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves,
            create_graph=create_graph))
    assert grads[0][0].any()
    for expected, found in zip(*grads, strict=True):
        assert torch.equal(expected, found)
