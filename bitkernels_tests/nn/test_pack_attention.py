"""Packed layers in attention and transformers, which read projections around their forward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
from torch import nn

from bitkernels.nn import BinaryLinear, PackedLinear, binarize, pack
from bitkernels_tests.cases import reals

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("by", ["binarize", "hand"])
def test_packed_transformers_call_their_layers(by):
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    if by == "binarize":
        binarize(model, skip_first=False, skip_last=False)
    else:
        for block in model.layers:
            block.linear1, block.linear2 = BinaryLinear(32, 64).eval(), BinaryLinear(64, 32).eval()
    packed = pack(model)
    x = reals(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    h = x
    for block in model.layers:
        h = block.norm1(h + block.self_attn(h, h, h, key_padding_mask=mask)[0])
        h = block.norm2(h + block.linear2(F.relu(block.linear1(h))))
    for one in (packed, copy.deepcopy(packed)):
        assert isinstance(one.layers[0].linear1, PackedLinear)
        with torch.no_grad():
            torch.testing.assert_close(one(x, src_key_padding_mask=mask), h)
    if by == "binarize":
        with torch.no_grad():
            torch.testing.assert_close(model(x, src_key_padding_mask=mask), h)
