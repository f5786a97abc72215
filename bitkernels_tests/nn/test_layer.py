"""The one warning of a layer whose input has a single sign."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.utils import prune

import bitkernels.nn as bnn
from bitkernels.nn.hooks import is_patched
from bitkernels.quantizers import NoOp

LAYERS = {
    "1d": (lambda **options: bnn.BinaryConv1d(8, 4, 1, **options), (2, 8, 6)),
    "2d": (lambda **options: bnn.BinaryConv2d(8, 4, 3, **options), (2, 8, 6, 6)),
    "3d": (lambda **options: bnn.BinaryConv3d(8, 4, 1, **options), (2, 8, 3, 3, 3)),
    "linear": (lambda **options: bnn.BinaryLinear(8, 4, **options), (4, 8)),
}


def said(layer, *inputs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in inputs:
            layer(x)
    assert all(w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, dict(input_quantizer=None),
                                     dict(input_quantizer="approx_sign", weight_scale="xnor")])
def test_one_warning_at_the_first_training_forward(kind, options, device):
    make, shape = LAYERS[kind]
    x = torch.rand(shape, device=device)
    layer = make(**options).to(device)
    assert said(layer.eval(), x) == []
    (text,) = said(layer.train(), x, x)
    assert type(layer).__name__ in text and "every sign" in text and "is +1" in text
    assert "RPReLU" in text
    assert "is -1" in said(make(**options).to(device), -1 - x)[0]
    assert said(make(**options).to(device), x - 0.5, x) == []


def test_not_of_few_values_or_of_other_quantizers():
    assert said(bnn.BinaryLinear(8, 4), torch.rand(1, 8)) == []
    assert said(bnn.BinaryLinear(8, 4), torch.rand(0, 8)) == []
    assert said(bnn.BinaryLinear(8, 4, input_quantizer=NoOp(precision=32)), torch.rand(9, 8)) == []
    assert said(bnn.BinaryLinear(8, 4, input_quantizer=bnn.NormSign(8, 0)), torch.rand(9, 8)) == []


def test_copies_and_states_know_nothing_of_it():
    layer, x = bnn.BinaryConv2d(8, 4, 3), torch.rand(2, 8, 6, 6)
    keys = list(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert len(said(twin, x, x)) == 1 and list(twin.state_dict()) == keys
        assert said(copy.deepcopy(twin), x) == []


def test_compilers_tracers_and_transforms_do_not_look():
    x = torch.rand(2, 8, 6, 6)
    layer = bnn.BinaryConv2d(8, 4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert said(compiled, x, x) == []
    torch.export.export(layer, (x,))
    torch.fx.symbolic_trace(nn.Sequential(layer))
    assert said(bnn.BinaryConv2d(8, 4, 3).to("meta"), x.to("meta")) == []
    assert len(said(layer, x)) == 1  # they left it to this one
    assert said(compiled, x) == []


def test_zeros_that_are_loaded_are_reported():
    layer, x = bnn.BinaryConv2d(16, 8, 3), torch.randn(1, 16, 5, 5)
    layer(x)
    state = layer.state_dict()
    layer.load_state_dict(state | {"weight": torch.zeros(8, 16, 3, 3)})
    with pytest.warns(UserWarning, match="100% of the weights are 0"):
        layer(x)
    prune.identity(layer, "weight")
    layer.load_state_dict({"bias": layer.bias, "weight_orig": torch.randn(8, 16, 3, 3),
                           "weight_mask": (torch.rand(8, 16, 3, 3) < 0.1).float()})
    with pytest.warns(UserWarning, match=r"% of the weights are 0"):
        layer(x)


def test_a_method_of_another_instance_is_a_replacement():
    """And the class's own, as accelerate leaves it, is none."""
    first, second = bnn.BinaryConv2d(8, 8, 3), bnn.BinaryConv2d(8, 8, 3)
    first.forward = first.forward
    assert not is_patched(first) and first.pack_obstacle() is None
    first.forward = second.forward
    assert is_patched(first) and "replaced on the instance" in first.pack_obstacle()


def test_weights_that_torchao_has_quantized_are_refused():
    """Their rounding makes small weights 0, whose sign is +1."""
    class Int8Tensor(torch.Tensor):
        pass

    Int8Tensor.__module__ = "torchao.quantization"
    layer, x = bnn.BinaryLinear(8, 4), torch.randn(2, 8)
    before = layer(x)
    with pytest.raises(ValueError, match="weight must be real, got Int8Tensor of torchao"):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Int8Tensor))
    assert torch.equal(layer(x), before)


def test_children_may_be_assigned_while_they_are_listed():
    """As tools do that wrap modules: activation checkpoints, FSDP's policies."""
    def wrap(module):
        for name, child in module.named_children():
            wrap(child)
            setattr(module, name, child)

    model, x = nn.Sequential(bnn.BinaryConv2d(8, 4, 3), bnn.BinaryLinear(4, 4)), torch.randn(
        2, 8, 3, 6)
    before, names = model(x), [name for name, _ in model.named_modules()]
    wrap(model)
    assert torch.equal(model(x), before)
    assert [name for name, _ in model.named_modules()] == names and model[0].on_bits
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, bnn.BinaryLayer))
    assert torch.equal(model(x), before) and torch.equal(bnn.pack(model)(x), before)
