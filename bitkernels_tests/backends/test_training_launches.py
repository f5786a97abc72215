"""Launches of a training step on a GPU, counted without one by the operators that it calls."""

from __future__ import annotations

import collections
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitkernels.nn as bnn
from bitkernels.ops import _conv2d_backward, _training

ops = torch.ops.bitkernels
binary_residual_block = sys.modules["bitkernels.ops.binary_residual_block"]

# Of the operators' kernels (backends/triton/test_launch.py counts them); the convolution with its
# sums is one launch of csrc/cuda.
OURS = {"rprelu_backward": 2, "residual_block_backward": 2, "sign_backward": 2}
# Of PyTorch's on a GPU, at most: statistics, their finish and the pass.
TORCHS = {"native_batch_norm": 3, "native_batch_norm_backward": 3, "cudnn_batch_norm": 3}
# What it launches nothing for, beside views.
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}


class Launches(TorchDispatchMode):
    """What launches how many kernels, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if func.namespace == "bitkernels":
            self.found[name] += OURS.get(name, 1)
        elif name == "convolution_backward":
            self.found[name] += sum(args[-1][:2])
        elif name not in FREE and not func.is_view:
            self.found[name] += TORCHS.get(name, 1)
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, dtype: torch.dtype) -> collections.Counter[str]:
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    x, grad = (torch.randn(4, 64, 8, 8).to(dtype, memory_format=torch.channels_last)
               for _ in range(2))
    x.requires_grad_()
    with Launches() as launches:
        model(x).backward(grad)
    return launches.found


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What depends on the device, on the CPU's tensors."""
    monkeypatch.setattr(_conv2d_backward, "by_tables", lambda *arguments: (False, False))
    for name in ("statistics", "gradients"):
        op = getattr(ops, f"residual_block_{name}").default
        monkeypatch.setattr(binary_residual_block, name, lambda run, *args, op=op: op(*args))
    monkeypatch.setattr(
        _training, "finish_weight_grad", lambda grad, weight, words, scale, train, *wants:
        _training.finish_in_one(grad, weight, scale, train, *wants))


def parts(channels, **kw):
    conv = bnn.BinaryConv2d(channels, channels, 3, padding=1, bias=False, input_quantizer=None,
                            **kw)
    return bnn.RSign(channels, "ste_sign"), conv, nn.BatchNorm2d(channels), bnn.RPReLU(channels)


def block(channels, **kw) -> nn.Module:
    sign, conv, norm, act = parts(channels, **kw)
    return bnn.BinaryResidualBlock(conv, norm, sign=sign, act=act)


class Layers(nn.Module):
    def __init__(self, sign, conv, norm, act) -> None:
        super().__init__()
        self.sign, self.conv, self.norm, self.act = sign, conv, norm, act

    def forward(self, x):
        return self.act(self.norm(self.conv(self.sign(x))) + x)


@pytest.mark.parametrize("dtype,scale,most", [
    (torch.float16, None, 24), (torch.float32, None, 21),
    (torch.float16, "detached", 27), (torch.float32, "detached", 24)])
def test_a_block(dtype, scale, most):
    """A scale costs its two, and one on the weight's signs; running statistics take five in
    float16 and three in float32, the shift's gradient one for its type."""
    found = step(block(64, weight_scale=scale), dtype)
    assert found.total() <= most, found


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_layers(dtype):
    found = step(Layers(*parts(64)), dtype)
    assert found.total() <= 40, found
