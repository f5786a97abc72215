"""`BinaryResidualBlock(input_grad_dtype=torch.float8_e5m2)`: what is rounded, what is not, what is
refused."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from bitkernels import nn as bnn
from bitkernels_tests.nn.test_residual_block import (
    bireal,
    padded,
    quicknet,
    reactnet,
    reactnet_down,
)

FLOAT8 = torch.float8_e5m2
pytestmark = pytest.mark.usefixtures("one_thread")
module = sys.modules["bitkernels.ops.binary_residual_block"]
BLOCKS = reactnet, reactnet_down, bireal, quicknet, padded


def gradients(block, factor=1.0):
    """Of a step under autocast, by name; input is one of them."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 12, 12).bfloat16().requires_grad_()
    block = copy.deepcopy(block).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.backward(factor * torch.randn(out.shape).to(out.dtype))
    return {"input": x.grad.float(), **{name: p.grad for name, p in block.named_parameters()}}


def as_float8(block):
    block = copy.deepcopy(block)
    block.input_grad_dtype = FLOAT8
    return block


def distance(got, wanted) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("make", BLOCKS)
def test_the_way_to_the_input_is_rounded_and_no_other(make, monkeypatch):
    """Exactly what a convolution's backward gives whose gradient was rounded to the input alone."""
    torch.manual_seed(1)
    block = make()
    got, plain = gradients(as_float8(block)), gradients(block)
    for name in plain:
        if name not in ("input", "sign.shift"):
            assert torch.equal(got[name], plain[name]), name
        else:
            assert 1e-3 < distance(got[name], plain[name]) < 0.15, name
    backward = module.conv2d_backward

    def rounding(grad, words, weight, weight_words, scale, conv, wants_input, wants_weight):
        factor = 1.0 if scale is None else scale.to(grad.dtype).view(-1, 1, 1, 1).movedim(0, 1)
        rounded = (grad * factor).to(FLOAT8).to(grad.dtype)
        of_input, _ = backward(rounded, words, weight, weight_words, None, conv, True, False)
        return of_input, backward(grad, words, weight, weight_words, scale, conv, False, True)[1]

    monkeypatch.setattr(module, "conv2d_backward", rounding)
    wanted = gradients(block)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


@pytest.mark.parametrize("dtype", (None, FLOAT8), ids=str)
@pytest.mark.parametrize("make", BLOCKS)
def test_one_pass_gives_the_gradients_of_two(make, dtype, monkeypatch):
    """As on a GPU: convolution and sign at once, here by the reference."""
    torch.manual_seed(1)
    block = make()
    block.input_grad_dtype = dtype
    wanted, asked = gradients(block), []

    def in_one_pass(grad, rounded, conv):
        asked.append(conv)
        return conv.stride == (1, 1) and conv.groups == 1

    monkeypatch.setattr(module, "in_one_pass", in_one_pass)
    got = gradients(block)
    assert asked
    for name in wanted:
        assert distance(got[name], wanted[name]) < 4e-3, name  # bfloat16's rounding


def test_what_float8_does_not_hold():
    """Beyond float16's range it is infinite, which a GradScaler looks for; below 2^-17 it is 0, for
    which there is the scale of the loss."""
    block = reactnet()
    block.shortcut = bnn.NoShortcut()
    plain, rounded = gradients(block, 1e-9), gradients(as_float8(block), 1e-9)
    assert plain["input"].any() and not rounded["input"].any() and rounded["conv.weight"].any()
    assert not gradients(as_float8(block), 1e9)["input"].isfinite().all()
    scaled = gradients(as_float8(block), 1e-9 * 2**30)["input"] / 2**30
    assert distance(scaled, plain["input"]) < 0.1


def test_a_grad_scaler_finds_the_scale():
    block, losses = as_float8(reactnet()), []
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x, target = torch.randn(2, 2, 40, 6, 6)
    for _ in range(40):
        optimizer.zero_grad()
        inside = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (block(inside) - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**40 and losses[-1] < 0.9 * losses[0]
    assert all(p.isfinite().all() for p in block.parameters())


def test_compiled():
    block, x = as_float8(reactnet()), torch.randn(2, 40, 6, 6)
    found = []
    for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        inside = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            call(inside).square().sum().backward()
        found.append(inside.grad)
    assert torch.equal(*found)


def test_copies_and_state():
    block = as_float8(reactnet())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.input_grad_dtype == FLOAT8
    assert block.state_dict().keys() == reactnet().state_dict().keys()
    assert "input_grad_dtype=torch.float8_e5m2" in repr(block)
    older = reactnet()
    del older.input_grad_dtype  # as pickled before it was there
    gradients(older)


def test_what_is_refused():
    def build(dtype):
        return bnn.BinaryResidualBlock(bnn.BinaryConv2d(8, 8, 3, padding=1, bias=False),
                                       nn.BatchNorm2d(8), input_grad_dtype=dtype)

    for dtype in (torch.float16, torch.float8_e4m3fn, "float8_e5m2"):
        with pytest.raises(ValueError, match="input_grad_dtype must be torch.float8_e5m2 or None"):
            build(dtype)
    block, x = build(FLOAT8), torch.randn(2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="dtype must be float16 or bfloat16, or the input, with"):
        block(x)
    block.fused = False
    with pytest.raises(RuntimeError, match="needs the fused operator, .* here: fused is False"):
        block(x)
    with torch.no_grad():
        block(x)
    block.fused = True
    block.eval()
    with torch.no_grad():
        block(x)
    with pytest.raises(RuntimeError, match="here: gradients with running statistics"):
        block(x)
