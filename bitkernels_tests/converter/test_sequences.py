"""Networks of 1-d convolutions: their norms and activations go into the products, and the C++
engine runs them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkernels.nn as bnn
from bitkernels.backends import cpu
from bitkernels.converter import compare, convert
from bitkernels.converter.engine import Engine
from bitkernels_tests.converter.networks import shuffled

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(3, 32, 17, generator=torch.Generator().manual_seed(0))


class Behind(nn.Module):
    """What a function makes of a binary convolution, between it and another."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        self.first, self.norm = bnn.BinaryConv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.prelu, self.rprelu = nn.PReLU(32), bnn.RPReLU(32)
        self.vector = nn.Parameter(torch.linspace(-1, 1, 32).view(1, 32, 1))
        self.along = nn.Parameter(torch.linspace(-1, 1, 17))
        self.last = bnn.BinaryConv1d(32, 8, 3, stride=2, dilation=2, groups=2)

    def forward(self, x):
        return self.last(self.function(self, self.first(x), x))


BEHIND = {  # and what is left between the two products
    "a norm": (lambda s, y, x: s.norm(y), set()),
    "clamps": (lambda s, y, x: F.hardtanh(s.norm(y)), set()),
    "slopes": (lambda s, y, x: s.prelu(s.norm(y) + x), set()),
    "an RPReLU": (lambda s, y, x: s.rprelu(s.norm(y)), set()),
    "vectors": (lambda s, y, x: (y * s.vector + s.vector[0]) / 3 - s.vector, set()),
    "a shift": (lambda s, y, x: y + s.vector.expand_as(y), set()),
    "a max pooling": (lambda s, y, x: s.norm(F.max_pool1d(y, 3, 2, 1)),
                      {"bitkernels.packed_max_pool2d"}),
    "an average": (lambda s, y, x: s.norm(F.avg_pool1d(y, 3, 1, 1, count_include_pad=False)),
                   {"avg_pool2d"}),
    "an average of a size": (lambda s, y, x: F.adaptive_avg_pool1d(s.norm(y), 9),
                             {"adaptive_avg_pool2d"}),
    "a gate": (lambda s, y, x: y * y.mean(2, keepdim=True).sigmoid(),
               {"mean", "sigmoid", "mul"}),
    "values along it": (lambda s, y, x: s.norm(y) + s.along, {"add"}),
    "from a number": (lambda s, y, x: 3 - s.norm(y), set()),
    "another sequence first": (lambda s, y, x: x - s.norm(y), {"sub"}),
    "its own row": (lambda s, y, x: s.norm(y.unsqueeze(2).squeeze(2)), set()),
}
STAY = {
    "a norm of rows": lambda s, y, x: F.layer_norm(y, (17,)),
    "a matrix": lambda s, y, x: y + x[0, 0],
    "a product of sequences": lambda s, y, x: y @ x.mT @ x,
    "an image": lambda s, y, x: (y + x.unsqueeze(1))[:, 0],
    "slopes of what is one row": lambda s, y, x: torch.prelu(x, s.first(x).mean().reshape(1)),
}


@pytest.mark.parametrize("name", BEHIND | STAY)
def test_values_stay(name):
    function, left = BEHIND.get(name, (STAY.get(name), None))
    model = shuffled(Behind(function))
    network = convert(model, X)
    for batch in (X, X[:1], torch.cat([X, X])):
        with torch.no_grad():
            wanted, got = model(batch), network(batch)
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    found = compare(model, network, X)
    assert found.far == 0 and len(network.report.products) == 2
    if left is not None:
        frame = {"contiguous", "unsqueeze", "squeeze", "bitkernels.sign_pack"}
        assert set(dict(network.report.others)) - frame == left
        assert not any(p.epilogue == () and left == set() for p in network.report.products[:1])
        if cpu.active() is not None:
            assert isinstance(network.engine(X), Engine), network.engine(X)


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


CODE = {
    "plain": lambda x, w: F.conv1d(signs(x), w),
    "all options": lambda x, w: F.conv1d(signs(x), w[:, :16], 3 * w[:, 0, 0], 2, 3, 2, 2),
    "padded with -1": lambda x, w: F.conv1d(F.pad(signs(x), (2, 2), value=-1.0), w, stride=2),
    "padded with 0 twice": lambda x, w: F.conv1d(F.pad(signs(x), (1, 1)), w, padding=1),
    "of what is padded": lambda x, w: F.conv1d(signs(F.pad(x, (1, 1))), w),
    "times a number": lambda x, w: F.conv1d(signs(x) * 0.4, w),
}


@pytest.mark.parametrize("name", CODE)
def test_code_on_real_numbers(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            latent = torch.randn(8, 32, 3, generator=torch.Generator().manual_seed(1))
            self.weight = nn.Parameter(latent.sign() * latent.abs().mean((1, 2), keepdim=True))
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(CODE[name](x, self.weight))

    model = shuffled(Model())
    network = convert(model, X)
    assert [(p.name, p.kind) for p in network.report.products] == [("weight", "conv2d")]
    assert "bias" in network.report.products[0].epilogue
    with torch.no_grad():
        assert torch.allclose(network(X), model(X), rtol=1e-5, atol=1e-4)


def test_one_sequence_without_a_batch():
    model = nn.Sequential(bnn.BinaryConv1d(32, 8, 3), nn.ReLU()).eval()
    network = convert(model, X[0], dynamic_shapes=({},))
    with torch.no_grad():
        assert torch.equal(network(X[0]), model(X[0]))
