"""Binary weights that are pruned, normed or parametrized: optimizers, clipping and metrics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from bitkernels.metrics import watch
from bitkernels.nn import BinaryConv2d, BinaryLinear
from bitkernels.optim import (
    Bop,
    CaseOptimizer,
    binary_weights,
    clip_latent_weights,
    is_binary_weight,
)

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")]


class Centre(nn.Module):
    def forward(self, w):
        return w - w.mean()


class Product(nn.Module):
    def forward(self, u, v):
        return u @ v

    def right_inverse(self, w):
        return w[:, :1].clone(), w[:1].clone()


def parametrized(layer, parametrization):
    parametrize.register_parametrization(layer, "weight", parametrization)


KINDS = {
    "prune.identity": (lambda m: prune.identity(m, "weight"), "weight_orig"),
    "prune.l1": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "weight_orig"),
    "weight_norm": (torch.nn.utils.weight_norm, "weight_v"),
    "spectral_norm": (torch.nn.utils.spectral_norm, "weight_orig"),
    "parametrize": (lambda m: parametrized(m, Centre()), "parametrizations.weight.original"),
    "parametrizations.weight_norm": (torch.nn.utils.parametrizations.weight_norm,
                                     "parametrizations.weight.original1"),
    "parametrizations.spectral_norm": (torch.nn.utils.parametrizations.spectral_norm,
                                       "parametrizations.weight.original")}


@pytest.fixture(params=KINDS)
def network(request):
    """A model of which the first layer's weight is not its parameter, and that one's name."""
    change, name = KINDS[request.param]
    model = nn.Sequential(BinaryConv2d(4, 8, 3), nn.Flatten(), BinaryLinear(8, 3))
    change(model[0])
    return model, f"0.{name}"


def steps(model, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 3, 3)).square().sum().backward()
        optimizer.step()


def test_the_parameter_of_the_signs_is_binary(network):
    model, name = network
    assert set(binary_weights(model)) == {name, "2.weight"}
    claims = is_binary_weight(model)
    claimed = [n for n, p in model.named_parameters() if claims(n, p)]
    assert sorted(claimed) == sorted([name, "2.weight"])
    optimizer = CaseOptimizer(model, (claims, lambda ps: Bop(ps, gamma=0.5)),
                              default=lambda ps: torch.optim.SGD(ps, lr=0.1))
    steps(model, optimizer)
    latent = dict(model.named_parameters())[name]
    assert latent.abs().eq(1).all()
    wrapped = nn.ModuleDict(dict(module=torch.compile(model, backend="eager")))
    assert set(binary_weights(wrapped)) == {f"module._orig_mod.{name}",
                                            "module._orig_mod.2.weight"}


def test_clipping_and_metrics_see_it(network):
    model, name = network
    latent = dict(model.named_parameters())[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clip_latent_weights(optimizer, model, 0.5)
    with torch.no_grad():
        latent.mul_(100)
    steps(model, optimizer, 1)
    assert latent.abs().max() == 0.5
    with watch(model, optimizer, window=1) as watcher:
        before = model[0].binary_weight()
        steps(model, optimizer, 1)  # without a change
        assert watcher.scalars()["flip_ratio/0"] == 0
        assert 0 <= watcher.scalars()["dead_weights/0"] <= 1
        with torch.no_grad():
            latent.copy_(torch.randn_like(latent))
        optimizer.step()  # no forward has recomputed the attribute yet
        flips = (model[0].binary_weight() != before).float().mean().item()
        assert flips > 0.2 and watcher.scalars()["flip_ratio/0"] == pytest.approx(flips)
        assert "weight/0" in watcher.histograms()


def test_parameters_of_other_shapes_are_refused_by_name():
    model = nn.Sequential(BinaryLinear(8, 8))
    parametrized(model[0], Product())
    for use in (binary_weights, is_binary_weight,
                lambda m: clip_latent_weights(torch.optim.SGD(m.parameters()), m)):
        with pytest.raises(ValueError, match="0: no parameter has the shape of its weight"):
            use(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with watch(model) as watcher:  # the metrics see the weight itself
        model(torch.randn(2, 8)).sum().backward()
        with torch.no_grad():
            model[0].parametrizations.weight.original0.neg_()
        watcher.update()
        assert watcher.scalars()["flip_ratio/0"] > 0.9
    with pytest.raises(ValueError, match="holds none of the binary weights"):
        watch(model, optimizer)
