"""What depends on constants alone is computed when a network is converted."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitkernels.converter import convert, load_converted, save_converted

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(3, 32, 6, 6, generator=torch.Generator().manual_seed(0))


class Weighted(nn.Module):
    """A convolution of signs with what a function makes of a weight and a number in a buffer."""

    def __init__(self, made):
        super().__init__()
        self.made = made
        self.weight = nn.Parameter(
            torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(1)))
        self.tau = nn.Buffer(torch.tensor(0.9))

    def forward(self, x):
        return F.conv2d(torch.where(x >= 0, 1.0, -1.0), self.made(self.weight, self.tau))


def clipped(w, tau):
    bound = (-w.abs().mean() * torch.log(2 - 2 * tau)).item()
    return torch.clamp(w, -bound, bound).sign()


def standardized(w, tau):
    deviation, mean = torch.std_mean(w, (1, 2, 3), keepdim=True)
    return ((w - mean) / deviation).sign() * deviation


FOLDED = {
    "a number": clipped,
    "a number first": lambda w, tau: tau.abs() * w.sign(),
    "arithmetic on a number": lambda w, tau: w.sign() * (1 - 2 * tau.item()),
    "two results": standardized,
    "one of two results": lambda w, tau: w.sign() * w.flatten(1).max(1)[0].view(-1, 1, 1, 1),
    "parts": lambda w, tau: torch.cat(w.sign().chunk(4, 1)[::-1], 1),
}


@pytest.mark.parametrize("name", FOLDED)
def test_of_constants(name, tmp_path):
    model = Weighted(FOLDED[name]).eval()
    network = convert(model, X)
    assert [p.name for p in network.report.products] == ["weight"] and not network.report.real
    assert dict(network.report.others).keys() == {"contiguous", "bitkernels.sign_pack"}
    with torch.no_grad():
        assert torch.allclose(network(X), model(X), rtol=0, atol=1e-4)
    pytest.importorskip("safetensors")
    save_converted(network, tmp_path / "network.safetensors")
    assert torch.equal(load_converted(tmp_path / "network.safetensors")(X), network(X))


def test_what_is_no_constant_stays():
    """Numbers made of sizes, and of random numbers."""
    model = Weighted(lambda w, tau: w * torch.rand(()).clamp_min(2.0))
    model.forward = lambda x: F.conv2d(x, model.made(model.weight, 0)) / x.shape[0]
    network = convert(model.eval(), X)
    assert dict(network.report.others)["rand"] == 1
    for batch in (X, X[:1]):
        with torch.no_grad():
            assert torch.allclose(network(batch), model(batch), atol=1e-4)
    calls = [n.target for n in network.graph_module.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.sym_size.int in calls and operator.mul not in calls


def test_a_file_of_a_weight_that_the_network_computes(tmp_path):
    pytest.importorskip("safetensors")

    class Dynamic(Weighted):
        def forward(self, x):
            return F.conv2d(x, self.weight * x.mean())

    model = Dynamic(None).eval()
    network = convert(model, X)
    assert network.report.real == (("conv2d", "a product of two activations"),)
    save_converted(network, tmp_path / "network.safetensors")
    again = load_converted(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(again(X), network(X)) and torch.allclose(again(X), model(X), atol=1e-5)
