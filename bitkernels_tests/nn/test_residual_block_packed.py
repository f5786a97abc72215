"""Residual blocks in evaluation and after `pack`: one convolution, of the weights as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitkernels import nn as bnn
from bitkernels import quantizers
from bitkernels_tests.nn.test_residual_block import (
    BLOCKS,
    CHANNELS,
    batch,
    hooked,
    near,
    pair_of,
    reactnet,
    step,
    swapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_packed_model_predicts_the_same():
    blocks = [BLOCKS[name]() for name in ("reactnet", "bireal", "quicknet", "reactnet_down")]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    for _ in range(3):
        model(batch())
    model.eval()
    packed, x = bnn.pack(model), batch(64, CHANNELS, 8, 6)
    assert not any(isinstance(m, bnn.BinaryConv2d) for m in packed.modules())
    with torch.no_grad():
        a, b = model(x), packed(x)
    assert torch.equal(a.argmax(1), b.argmax(1))
    near(a, b)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_packed_block_is_one_convolution(name):
    """The same call as before `pack`, so the same bits."""
    block = pair_of(BLOCKS[name])[0]
    step(block, batch())
    packed, x = bnn.pack(block), batch()
    block.eval()
    assert type(packed.conv) is bnn.PackedConv2d
    with torch.no_grad():
        assert packed.unfused(x) is None
        assert torch.equal(packed(x), block(x))
        packed.fused = False
        near(packed(x), block(x))


@pytest.mark.parametrize("reason, change", [
    ("conv is packed and norm takes batch statistics", lambda b: b.train()),
    ("conv is packed and norm takes batch statistics",
     swapped("norm", lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False))),
    ("conv has an input quantizer",
     lambda b: setattr(b.conv, "input_quantizer", quantizers.SteSign())),
    ("conv has hooks", hooked("conv")),
    ("conv has a bias or a padding mode", lambda b: setattr(
        b.conv, "bias", torch.ones(CHANNELS))),
], ids=["training", "no statistics", "quantizer", "hooks", "bias"])
def test_reasons_to_run_the_layers_of_a_packed_block(reason, change):
    packed = bnn.pack(pair_of(reactnet)[0])
    change(packed)
    x, fresh = batch(), copy.deepcopy(packed)
    with torch.no_grad():
        assert packed.unfused(x) == reason
        expected = fresh.act(fresh.norm(fresh.conv(fresh.sign(x))) + x)
        assert torch.equal(packed(x), expected)


def test_evaluation_follows_the_weight():
    """Also through writes that raise no version: of .data, and of a fused optimizer."""
    block, x = pair_of(reactnet)[0].eval(), batch()
    fresh = copy.deepcopy(block)

    def fused_adam(w):
        w.grad = torch.randn_like(w)
        torch.optim.Adam([w], lr=1.0, fused=True).step()

    writes = [lambda w: w.neg_(), lambda w: w.mul_(2), lambda w: w[0].copy_(w[1].neg()),
              lambda w: w.data.copy_(torch.randn_like(w)), fused_adam]
    with torch.no_grad():
        for write in writes:
            before = block(x)
            write(block.conv.weight)
            fresh.load_state_dict(block.state_dict())
            fresh.fused = False
            assert not torch.equal(block(x), before)
            near(block(x), fresh(x))
        block.conv.weight_scale = None
        fresh.conv.weight_scale = None
        near(block(x), fresh(x))
        block.conv.weight = nn.Parameter(torch.randn_like(block.conv.weight))
        fresh.load_state_dict(block.state_dict())
        near(block(x), fresh(x))


def test_signs_that_say_nothing_warn_in_a_fused_block():
    block = reactnet()
    with pytest.warns(UserWarning, match="BinaryConv2d.*every sign of its first training input"):
        block(batch().abs())
