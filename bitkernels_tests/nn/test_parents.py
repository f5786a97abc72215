"""Binary layers put by hand into PyTorch's modules that read the weights of their children."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from bitkernels import nn as bnn

pytestmark = pytest.mark.filterwarnings("ignore:.*every sign of its first training input",
                                        "ignore:enable_nested_tensor is True")


def transformer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    layer.linear1, layer.linear2 = bnn.BinaryLinear(32, 64), bnn.BinaryLinear(64, 32)
    return layer.eval()


def by_hand(layer, x):
    """The layer's own arithmetic, norms last."""
    x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
    return layer.norm2(x + layer.linear2(nn.functional.gelu(layer.linear1(x))))


@pytest.mark.parametrize("change", (
    lambda layer: layer, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), bnn.pack))
def test_a_transformer_layer_calls_them_in_evaluation(change):
    """Its fused inference would take the latent weights."""
    torch.manual_seed(0)
    layer, x = change(transformer()), torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x))
        torch.testing.assert_close(nn.TransformerEncoder(layer, 2).eval()(x),
                                   by_hand(layer, by_hand(layer, x)))


def test_packed_layers_too():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    layer.linear1 = bnn.pack(bnn.BinaryLinear(32, 64))
    assert not layer.activation_relu_or_gelu
    other = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    other.linear1 = nn.Linear(32, 64)
    assert other.activation_relu_or_gelu == 1


def test_an_attention_refuses_them():
    attention = nn.MultiheadAttention(32, 4)
    real = attention.out_proj
    for layer in (bnn.BinaryLinear(32, 32), bnn.pack(bnn.BinaryLinear(32, 32))):
        with pytest.raises(ValueError, match="MultiheadAttention: out_proj must be a real layer, "
                                             f"got {type(layer).__name__}: .* never calls it"):
            attention.out_proj = layer
        assert attention.out_proj is real

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    own, x = Own(32, 4), torch.randn(3, 32)
    own.out_proj = bnn.BinaryLinear(32, 32)
    assert torch.equal(own(x), own.out_proj(x))


class Reads(nn.Module):
    """Code as in torchvision's Swin."""

    def __init__(self):
        super().__init__()
        self.proj = bnn.BinaryLinear(8, 8)
        self.called = bnn.BinaryLinear(8, 8)

    def forward(self, x):
        x = self.called(x) + self.called.weight.mean()
        return self.attend(x.to(self.called.weight.dtype))

    def attend(self, x):
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


def test_code_that_reads_a_weight_alone_is_named():
    with pytest.warns(UserWarning, match=r"^Reads: its code reads proj\.weight and never calls "
                                         "proj, a BinaryLinear: it computes with the real") as said:
        net = Reads()
    assert [warning.filename for warning in said] == [__file__]
    with pytest.warns(UserWarning, match="proj.weight"):
        net.proj = bnn.BinaryLinear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.proj = nn.Linear(8, 8)
        net.called = bnn.BinaryLinear(8, 8)
        net.proj = bnn.pack(bnn.BinaryLinear(8, 8))
    with pytest.raises(RuntimeError, match="PackedLinear has no real weight: call the layer"):
        net(torch.randn(2, 8))
