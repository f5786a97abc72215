"""What a training step keeps for its backward: under torch.compile no more than without.

A compiler sees forward and backward as one graph and may keep what a backward is to compute again.
The graphs are cut as Inductor cuts them, and run without it.
"""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import bitkernels.nn as bnn
from bitkernels.ops import _conv2d_backward

CUT = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
                   partition_fn=min_cut_rematerialization_partition)


def block(**kw):
    conv = bnn.BinaryConv2d(64, 64, 3, padding=1, bias=False, input_quantizer=None)
    return bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(64), sign=bnn.RSign(64, "ste_sign"),
                                   act=bnn.RPReLU(64), **kw)


def quick_block():
    conv = bnn.BinaryConv2d(64, 64, 3, padding=1, bias=False, pad_value=1)
    return bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(64), relu=True)


MODULES = {
    "block": block,
    "block that keeps dot products": lambda: block(recompute=False),
    "block without activation": quick_block,
    "chain": lambda: nn.Sequential(block(), block()),
    "conv": lambda: bnn.BinaryConv2d(64, 96, 3, padding=1),
    "layers": lambda: nn.Sequential(
        bnn.RSign(64), bnn.BinaryConv2d(64, 64, 3, padding=1, input_quantizer=None),
        nn.BatchNorm2d(64), bnn.RPReLU(64)),
    "transposed": lambda: bnn.BinaryConvTranspose2d(64, 32, 3, 2),
    "linear": lambda: bnn.BinaryLinear(16, 64),
}


def step(model: nn.Module, call, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """(output and gradients, bytes kept for the backward beside the model's own tensors)."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if t.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = call(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())], sum(kept.values())


@pytest.mark.parametrize("name,by_library", [*((name, True) for name in MODULES),
                                             ("chain", False), ("conv", False)])
def test_a_compiled_step_keeps_no_more(monkeypatch, name, by_library):
    if by_library:  # as on a GPU
        monkeypatch.setattr(_conv2d_backward, "by_tables", lambda *arguments: (False, False))
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, other = MODULES[name](), MODULES[name]()
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 64, 16, 16).to(memory_format=torch.channels_last)
    compiled = torch.compile(other, fullgraph=True, backend=CUT)
    step(other, compiled, x)
    other.load_state_dict(model.state_dict())
    other.zero_grad()
    want, eager = step(model, model, x)
    found, kept = step(other, compiled, x)
    torch._dynamo.reset()
    for a, b in zip(want, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert kept <= eager + 2048, name  # a vector of channels is less


def test_recompute_keeps_bits(monkeypatch):
    """Of the dot products 2 bytes an element, compiled or not."""
    monkeypatch.setattr(_conv2d_backward, "by_tables", lambda *arguments: (False, False))
    x = torch.randn(4, 64, 16, 16).to(memory_format=torch.channels_last)
    for compiled in (False, True):
        kept = []
        for recompute in (True, False):
            torch._dynamo.reset()
            model = block(recompute=recompute)
            call = torch.compile(model, backend=CUT) if compiled else model
            kept.append(step(model, call, x)[1])
        assert kept[1] - kept[0] == 2 * x.numel()
    torch._dynamo.reset()
