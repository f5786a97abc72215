"""What the kernels of the Autograd key share: saved tensors that hooks compute, and the short way
of raw operators on plain CPU tensors, which nothing that looks on may be missed by."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Wrapped(torch.Tensor):
    """Holds a tensor, and no memory."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device)

    def __init__(self, inner) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def _operands():
    x, weight = torch.randn(2, 40, 5, 5), torch.randn(16, 40, 3, 3)
    ops = torch.ops.bitkernels
    return ops.sign_pack(x, None, 1), ops.sign_pack(weight, None, 1), 40


@pytest.mark.parametrize("grad", [True, False])
def test_a_raw_operator_is_the_same_for_whoever_looks_on(grad):
    words, filters, channels = _operands()
    op = torch.ops.bitkernels.packed_conv2d
    with torch.inference_mode():
        expected = op(words, filters, channels)
    with torch.set_grad_enabled(grad):
        assert torch.equal(op(words, filters, channels), expected)
        with _Seen() as seen:
            out = op(words, filters, channels)
        assert seen.names == ["bitkernels::packed_conv2d"] and torch.equal(out, expected)
        for first, second in ((_Wrapped(words), filters), (words, _Wrapped(filters))):
            assert torch.equal(op(first, second, channels), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(words, filters, channels), expected)
        batched = torch.vmap(lambda image: op(image[None], filters, channels)[0])(words)
        assert torch.equal(batched, expected)
        meta = op(words.to("meta"), filters.to("meta"), channels)
        assert meta.is_meta and meta.shape == expected.shape


def test_a_raw_operator_reads_no_tensor_without_memory():
    words, filters, channels = _operands()
    op = torch.ops.bitkernels.packed_conv2d
    with pytest.raises(RuntimeError):
        op(words.to_sparse(), filters, channels)
    nothing = torch._efficientzerotensor(words.shape, dtype=torch.int32)
    assert torch.equal(op(nothing, filters, channels), op(0 * words, filters, channels))


@pytest.mark.parametrize("grad", [True, False])
def test_a_raw_operator_refuses_in_transforms_and_in_every_argument(grad):
    words, filters, channels = _operands()
    op = torch.ops.bitkernels.packed_conv2d
    scale = torch.rand(16, requires_grad=True)
    with torch.set_grad_enabled(grad):
        if grad:
            with pytest.raises(RuntimeError, match="packed_conv2d: scale must not require grad"):
                op(words, filters, channels, scale=scale)
        else:
            assert not op(words, filters, channels, scale=scale).requires_grad
    with pytest.raises(RuntimeError, match="packed_conv2d: scale must not require grad"):
        torch.func.grad(lambda s: op(words, filters, channels, scale=s).sum())(scale.detach())
    with pytest.raises(RuntimeError, match="packed_conv2d: scale must not require grad"):
        torch.func.jvp(lambda s: op(words, filters, channels, scale=s), (scale.detach(),),
                       (torch.ones(16),))
