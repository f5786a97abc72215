"""Whole networks of the zoo in the engine and in PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch

from bitkernels import convert, models, save_converted
from bitkernels.models.registry import entry, takes_image_size
from bitkernels_tests.converter.networks import shuffled
from bitkernels_tests.network.engine import Engine

# Those of a few hundred MiB in their real layers, or of the calls of another one here.
LARGE = {"bnext_l", "bnext_m", "bnext_s", "dorefanet", "xnornet", "binary_alexnet",
         "binary_densenet37", "binary_densenet37_dilated", "binary_densenet45", "birealnet34",
         "quicknet_large", "quicknet_small", "reactnet34", "reactnet_b", "reactnet_c"}
NAMES = [pytest.param(n, marks=[pytest.mark.every] if n in LARGE else [])
         for n in models.list_models()]


def converted(name: str, seed: int = 0):
    torch.manual_seed(seed)
    size = 64
    options = {}
    if takes_image_size(entry(name).build):
        size = 224 if name == "xnornet" else 64
        options["image_size"] = size
    model = shuffled(models.create_model(name, num_classes=50, **options), seed)
    x = torch.randn(2, 3, size, size)
    return convert(model, x), x


# Those of which more is asked than their logits; to convert them takes 2 s each.
again = functools.cache(converted)
AGAIN = ("quicknet", "binary_densenet28", "birealnet18")


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, tmp_path):
    """A sign whose value is at its threshold may fall either way: then nearly all of the images
    still agree."""
    network, x = (again if name in AGAIN else converted)(name)
    save_converted(network, tmp_path / "n")
    engine = Engine(tmp_path / "n")
    images = torch.cat([x, torch.randn(4, *x.shape[1:])])
    expected = network(images)
    got, = engine(images)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    errors = (got - expected).abs().amax(1) / expected.abs().amax()
    assert int((errors < 1e-5).sum()) >= 5, errors
    one, = engine(images[:1].to(memory_format=torch.channels_last))
    assert (one - got[:1]).abs().max() <= 1e-5 * got.abs().max()


def test_what_becomes_one_step(tmp_path):
    """Padding, bounds and concatenation cost no step of their own."""
    network, x = again("quicknet")
    save_converted(network, tmp_path / "n")
    calls = [call for _, call, _, _ in Engine(tmp_path / "n").steps(x)]
    assert "aten.pad.default" not in calls and "aten.relu.default" not in calls
    network, x = again("binary_densenet28")
    save_converted(network, tmp_path / "n")
    steps = Engine(tmp_path / "n").steps(x)
    assert len(steps) < sum(n.op == "call_function" for n in network.graph_module.graph.nodes)
    assert not [s for s in steps if s[1] == "copy" and s[0].startswith("cat")]


def test_memory_is_used_again(tmp_path):
    network, x = again("birealnet18")
    save_converted(network, tmp_path / "n")
    engine = Engine(tmp_path / "n")
    constants, one = engine.memory(x[:1])
    size = (tmp_path / "n").stat().st_size
    assert 0.9 * size < constants < 1.2 * size
    # Two maps of 64 x 16 x 16 floats, words and the first layer's.
    assert one < 64 * 32 * 32 * 4 * 2
    assert engine.memory(x)[1] == pytest.approx(2 * one, rel=0.1)
