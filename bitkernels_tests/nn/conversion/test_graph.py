"""The order of a model's calls: traced or recorded, of the whole or of parts, leaving no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkernels.nn as bnn
from bitkernels.nn.conversion.graph import parts

C = 4


class Stateful(nn.Module):
    """Changes itself in every call, in all the ways there are."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls, self.last = nn.Linear(C, C), 0, None
        self.register_buffer("count", torch.zeros(1))
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.count += 1
        self.noise = torch.rand(1)
        return self.norm(self.line(F.relu(x)))


class Untraceable(nn.Module):
    """Its code depends on values, inside of which a block can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C))
        self.act, self.line = nn.ReLU(), nn.Linear(C, C)

    def forward(self, x):
        x = self.block(x)
        return self.line(self.act(x)) if x.abs().sum() > 0 else x


@pytest.mark.parametrize("example", [None, torch.randn(5, C)])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(example, training):
    model = nn.Sequential(nn.Linear(C, C), Stateful(), nn.Linear(C, C)).train(training)
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    hooks = dict(model[0]._forward_hooks), dict(model[0]._forward_pre_hooks)
    before = copy.deepcopy(model.state_dict())
    attributes = {k: v for k, v in vars(model[1]).items()}
    numbers = torch.get_rng_state()
    parts(model, example)
    assert vars(model[1]) == attributes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert (dict(model[0]._forward_hooks), dict(model[0]._forward_pre_hooks)) == hooks
    assert all(m.training == training for m in model.modules())
    assert bool(called) == (example is not None)


def test_traced_and_recorded_graphs_name_the_same_calls():
    model = nn.Sequential(nn.Linear(C, C), nn.Sequential(nn.ReLU(), nn.Linear(C, C)),
                          nn.Linear(C, C))
    for found in (parts(model), parts(model, torch.randn(2, C)),
                  parts(model, {"input": torch.randn(2, C)})):
        (part,) = found
        assert [n.target for n in part.graph.nodes if n.op == "call_module"] == [
            "0", "1.0", "1.1", "2"]


def test_parts_of_what_cannot_be_traced():
    model = nn.Sequential(nn.Linear(C, C), nn.ReLU(), Untraceable(), nn.Linear(C, C))
    assert [part.name for part in parts(model)] == ["", "2.block"]
    reports: list[bnn.BinarizeReport] = []
    with pytest.warns(UserWarning, match="cannot trace the calls of these layers.*2.line"):
        bnn.binarize(model, report=reports.append)
    # Of the block's first layer and of the line the order of registration speaks.
    assert reports[0].not_analysed == ["2.block.0", "2.line"]
    assert list(reports[0].activations) == ["1", "2.block.1", "2.act"]
    assert reports[0].kept == {"0": "first layer (skip_first)", "3": "last layer (skip_last)"}


def test_one_activation_for_many_untraced_layers():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.act = nn.ModuleList(nn.Linear(C, C) for _ in range(4)), nn.ReLU()

        def forward(self, x):
            for i in range(int(x.shape[0] + float(x.sum()) * 0) and 4):
                x = self.act(self.layers[i](x))
            return x

    model = nn.Sequential(nn.Linear(C, C), Loop(), nn.Linear(C, C))
    with pytest.warns(UserWarning, match="cannot trace"):
        bnn.binarize(model)
    assert isinstance(model[1].act, nn.PReLU)


def test_example_inputs_show_what_cannot_be_traced(recwarn):
    model = nn.Sequential(nn.Linear(C, C), nn.ReLU(), Untraceable(), nn.Linear(C, C))
    reports: list[bnn.BinarizeReport] = []
    bnn.binarize(model, example_inputs=torch.randn(2, C), report=reports.append)
    assert not reports[0].not_analysed and not recwarn
    assert list(reports[0].activations) == ["1", "2.block.1", "2.act"]


def test_errors_of_the_run_are_those_of_the_model():
    model = nn.Sequential(nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bnn.binarize(model, example_inputs=torch.randn(2, C + 1))
    assert not any(isinstance(m, bnn.BinaryLayer) for m in model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model)


def test_optional_arguments_have_their_defaults():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x, mask=None, scale: float = 1.0):
            x = self.a(x)
            return self.b(F.relu(x if mask is None else x * mask) * scale)

    model = nn.Sequential(nn.Linear(C, C), Optional(), nn.Linear(C, C))
    bnn.binarize(model)
    assert isinstance(model[1].b.input_quantizer, bnn.NormSign)
    model = nn.Sequential(nn.Linear(C, C), Optional())
    assert [p.name for p in parts(model[1])] == [""]
