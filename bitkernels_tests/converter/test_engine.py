"""A converted network in the C++ engine: when it runs there, that it follows its buffers."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import bitkernels.nn as bnn
from bitkernels.backends import cpu
from bitkernels.converter import convert
from bitkernels.converter.engine import Engine
from bitkernels_tests import forked
from bitkernels_tests.converter.networks import conv, norm, shuffled

pytestmark = pytest.mark.skipif(cpu.why_not is not None, reason="there is no engine")
IMAGE = (3, 8, 8)


def model():
    torch.manual_seed(0)
    return shuffled(nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), bnn.RSign(40),
        conv(40, 33), norm(33), bnn.RPReLU(33), conv(33, 64, stride=2), norm(64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), bnn.BinaryLinear(64, 7)))


@pytest.fixture
def network():
    return convert(model(), torch.randn(2, *IMAGE))


def in_torch(network, *inputs):
    network.arrange()
    with torch.no_grad():
        made = network.graph_module(*inputs)
    return made[0] if isinstance(made, (tuple, list)) else made


@pytest.mark.parametrize("made", [
    lambda: torch.randn(1, *IMAGE), lambda: torch.randn(5, *IMAGE),
    lambda: torch.randn(3, *IMAGE).contiguous(memory_format=torch.channels_last),
    lambda: torch.randn(6, *IMAGE)[::2], lambda: torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2),
    lambda: torch.randn(2, *IMAGE).flip(3), lambda: torch.randn(1, *IMAGE).expand(4, *IMAGE),
    lambda: torch.randn(3 * 3 * 8 * 8 + 1)[1:].view(3, *IMAGE), lambda: torch.empty(0, *IMAGE),
    lambda: torch.tensor(0.5).expand(4, *IMAGE)])
def test_inputs_of_any_strides(network, made):
    x = made()
    assert isinstance(network.engine(x), Engine)
    wanted = in_torch(network, x)
    for _ in range(2):
        torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-5)


def test_why_pytorch_runs_it(network):
    x = torch.randn(2, *IMAGE)

    class Subclass(torch.Tensor):
        pass

    assert "requires a gradient" in network.engine(x.clone().requires_grad_())
    with torch.no_grad():
        assert isinstance(network.engine(x.clone().requires_grad_()), Engine)
    assert "no plain" in network.engine(x.as_subclass(Subclass))
    assert "on meta" in network.engine(x.to("meta"))
    with torch.autocast("cpu"):
        assert "autocast" in network.engine(x)
        assert network(x).shape == (2, 7)
    told = []
    torch.vmap(lambda t: (told.append(network.engine(t)), t)[1])(x[None])
    assert "no plain" in told[0] or "torch.func" in told[0]
    double = convert(model().double(), x.double())
    assert "float64" in double.engine(x.double())
    torch.testing.assert_close(double(x.double()), model().double()(x.double()))


def test_an_operator_that_it_does_not_know():
    made = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Mish(), conv(32, 8), nn.Flatten()).eval()
    x = torch.randn(2, *IMAGE)
    network = convert(made, x)
    assert "mish" in network.engine(x)
    torch.testing.assert_close(network(x), made(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "other tensor"])
def test_it_follows_its_buffers(network, how):
    x = torch.randn(2, *IMAGE)
    network(x)
    state = {name: t.clone() for name, t in network.state_dict().items()}
    for name, tensor in state.items():
        tensor.copy_(~tensor if tensor.dtype == torch.int32 and tensor.dim() > 2 else tensor / 2
                     if tensor.is_floating_point() else tensor)
        if how == "in place":
            network.state_dict()[name].copy_(tensor)
        elif how == "other tensor":
            setattr(network.graph_module, name.partition(".")[2], tensor)
    if how == "load_state_dict":
        network.load_state_dict(state)
    fresh = convert(model(), x)
    before = fresh(x)
    got = network(x)
    assert isinstance(network.engine(x), Engine)
    torch.testing.assert_close(got, in_torch(network, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-2)


@pytest.mark.parametrize("how", ["other tensor", "other memory"])
def test_a_buffer_may_change_more_than_once_between_two_runs(how):
    """The last of them must not pass for the first, whose id and address it may have got."""
    x = torch.ones(1, 16)
    network = convert(nn.Linear(16, 64), x)
    buffers = network.graph_module._buffers
    name = next(n for n in network.state_names if buffers[n].dim() == 2)
    for step in range(20):
        before = network(x)
        for value in (step + 1.25, step + 1.5):
            if how == "other tensor":
                buffers[name] = torch.full((64, 16), value)
            else:
                buffers[name].data = torch.full((64, 16), value)
        assert not torch.equal(network(x), before)


def test_a_network_elsewhere_holds_no_buffers_here(network):
    network(torch.randn(2, *IMAGE))
    buffer = weakref.ref(next(iter(network.graph_module._buffers.values())))
    network.to("meta")
    gc.collect()
    assert buffer() is None


def test_an_input_of_another_type_is_no_input_seen_before(network):
    x = torch.randn(2, *IMAGE)
    engine = network.engine(x)
    engine([x])
    with pytest.raises(RuntimeError, match="int32"):
        engine([x.to(torch.int32)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_have_an_engine_of_their_own(network, copied):
    x = torch.randn(2, *IMAGE)
    before = network(x)
    other = copied(network)
    assert torch.equal(other(x), before) and other.engine(x) is not network.engine(x)
    other.state_dict()[next(n for n in other.state_dict() if n.endswith("bias"))].add_(1)
    assert torch.equal(network(x), before) and not torch.equal(other(x), before)


def test_threads_share_a_network(network):
    inputs = [torch.randn(1 + i % 3, *IMAGE) for i in range(24)]
    wanted = [network(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(network, inputs * 4), wanted * 4, strict=True):
            assert torch.equal(got, want)


def test_what_needs_pytorch_still_gets_the_graph(network):
    x = torch.randn(2, *IMAGE)
    wanted = in_torch(network, x)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), wanted)


def test_the_reference_may_be_asked_for():
    code = ("import torch, bitkernels; from bitkernels_tests.converter.test_engine import model; "
            "x = torch.randn(2, 3, 8, 8); n = bitkernels.convert(model(), x); n(x); "
            "print(n.engine(x))")
    done = forked.run("-c", code, env={**os.environ, "BITKERNELS_CPU": "reference"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "BITKERNELS_CPU=reference"


def test_memory_and_steps(network):
    x = torch.randn(2, *IMAGE)
    engine = network.engine(x)
    constants, activations = engine.memory([x])
    assert constants > 0
    # The input, turned; the stem's output and what reads it; not every activation at once.
    assert 2 * 40 * 64 * 4 <= activations <= 3 * 2 * 40 * 64 * 4
    steps = engine.timed([x])
    assert [s.operator for s in steps].count("aten.conv2d.default") == 1
    assert all(s.seconds >= 0 for s in steps) and sum("packed" in s.operator for s in steps) == 3
