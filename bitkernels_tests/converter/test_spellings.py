"""Other spellings of one computation: the same values, and calls that the C++ engine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitkernels.nn as bnn
from bitkernels.backends import cpu
from bitkernels.converter import convert
from bitkernels.converter.engine import Engine
from bitkernels_tests.converter.networks import conv, shuffled

pytestmark = pytest.mark.usefixtures("one_thread")
V = torch.linspace(-1, 1, 32).view(1, 32, 1, 1)


class Written(nn.Module):
    """What a function makes of the values behind a binary convolution, and one of those."""

    def __init__(self, function):
        super().__init__()
        self.function, self.before, self.after = function, conv(32, 32), conv(32, 8)
        self.vector = nn.Parameter(V.clone())

    def forward(self, x):
        return self.after(self.function(self.before(x), self.vector))


def gated(y, v):
    return y * y.mean((2, 3), keepdim=True).sigmoid().expand_as(y)


TOP = torch.tensor(1.5)


def above(y, bound):
    return torch.where(y > bound, bound, y)


def below(y, bound):
    return torch.where(y < bound, bound, y)


def swapped(parts):
    return torch.cat([*parts][::-1], 1)


RESPELLED = {
    "expanded": (lambda y, v: (y + v.expand_as(y)) * v.expand(y.shape) - v.expand_as(y), "expand"),
    "expanded first": (lambda y, v: v.expand_as(y) / (y + 0.5), "expand_as"),
    "a gate": (gated, "expand_as"),
    "from one": (lambda y, v: 1 - y.sigmoid() * 2, "rsub"),
    "chunks": (lambda y, v: swapped(y.chunk(3, 1)), "chunk"),
    "chunks of rows": (lambda y, v: torch.cat(y.chunk(2, -2)[::-1], 2), "chunk"),
    "parts": (lambda y, v: swapped(y.split(12, 1)), "split"),
    "parts of sizes": (lambda y, v: swapped(y.split([5, 0, 27], 1)), "split_with_sizes"),
    "one of the parts": (lambda y, v: y + y.split(1, 1)[-1], "split"),
    "unbound": (lambda y, v: swapped(F.pad(y, (1, 1)).unflatten(1, (2, 16)).unbind(1)), "unbind"),
    "an index": (lambda y, v: y * y[:, 3:4] + (y[:, :, -1] - y[:, :, 0]).unsqueeze(2), "select"),
    "a type of another": (lambda y, v: v.double().type_as(y) * y, "type_as"),
    "its own type": (lambda y, v: y * v.type_as(y), "type_as"),
    "clamps by where": (lambda y, v: below(above(y, TOP), -2 * TOP), "where"),
    "shuffled channels": (lambda y, v: F.channel_shuffle(y, 4), "channel_shuffle"),
    "shuffled pixels": (lambda y, v: F.pixel_shuffle(y, 2).repeat_interleave(4, 1),
                        "pixel_shuffle"),
}
KEPT = {
    "a difference with a factor": (lambda y, v: torch.rsub(y, 1, alpha=2), "rsub"),
    "a choice of another": (lambda y, v: torch.where(y > TOP, TOP, y + 1), "where"),
    "another bound": (lambda y, v: torch.where(y > TOP, 2 * TOP, y), "where"),
    "limits of channels": (lambda y, v: torch.where(y > v, TOP, y), "where"),
    "bounds of channels": (lambda y, v: torch.where(y > v, v, y), "where"),
    "bounds of another type": (lambda y, v: above(y, TOP.double()).float(), "where"),
    "at 0": (lambda y, v: below(y, 0 * TOP), "where"),
    "integers": (lambda y, v: y + (3 - (y > 0).to(torch.uint8)), "rsub"),
    "of the batch": (lambda y, v: y - y[0], "select"),
    "of another type": (lambda y, v: y + v[0, 0, 0, 0].double().expand_as(y).float(), "expand_as"),
}


@pytest.mark.parametrize("name", RESPELLED | KEPT)
def test_values_stay(name):
    function, call = (RESPELLED | KEPT)[name]
    model = shuffled(Written(function))
    x = torch.randn(3, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    network = convert(model, x)
    assert (call in dict(network.report.others)) == (name in KEPT)
    assert len(network.report.products) == 2
    for batch in (x, x[:1], torch.cat([x, x]), x[:0]):
        if name == "of the batch" and not len(batch):
            with pytest.raises((RuntimeError, IndexError)):
                network(batch)
            continue
        with torch.no_grad():
            torch.testing.assert_close(network(batch), model(batch), rtol=1e-5, atol=1e-4)
    needs = {"unbound": "unflatten", "shuffled pixels": "repeat_interleave"}.get(name)
    if cpu.active() is not None and name in RESPELLED:
        engine = network.engine(x)
        assert needs in str(engine) if needs else isinstance(engine, Engine), engine


@pytest.mark.parametrize("kernel, stride, padding, dilation, size", [
    (2, 2, 0, 1, (1, 1)), (2, 3, 0, 2, (2, 1)), (3, 3, 0, 1, (1, 3)), ((2, 1), 2, 0, 1, (1, 4)),
    (3, 2, 1, 1, (4, 4)), (2, 2, 0, 1, (3, 5))])
def test_pools_that_round_up(kernel, stride, padding, dilation, size):
    """A window may be larger than the image then, which words are not pooled by."""
    model = nn.Sequential(bnn.BinaryConv2d(32, 32, 1), nn.MaxPool2d(
        kernel, stride, padding, dilation, ceil_mode=True), bnn.BinaryConv2d(32, 32, 1)).eval()
    x = torch.randn(3, 32, *size)
    network = convert(model, x)
    with torch.no_grad():
        assert torch.equal(network(x), model(x))
    pools = [n for n, _ in network.report.others if n.endswith("max_pool2d")]
    assert pools == (["bitkernels.packed_max_pool2d"] if min(size) >= 3 else ["max_pool2d"])
