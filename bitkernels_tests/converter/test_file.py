"""Converted networks in files: equal after the journey, broken ones refused."""

from __future__ import annotations

import collections
import json
import os
import random
import sys

import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels.converter import convert, load_converted, save_converted
from bitkernels.nn import BinaryConv2d
from bitkernels_tests.converter.networks import conv, norm, shuffled

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def network():
    model = shuffled(models.ReActNet18(5, blocks=(1, 1), channels=(32, 64)))
    return convert(model, torch.randn(1, 3, 32, 32))


@pytest.fixture
def file(network, tmp_path):
    save_converted(network, tmp_path / "network")
    return tmp_path / "network"


def test_the_same_network_is_the_same_bytes(tmp_path):
    """safetensors itself orders metadata anew in each call."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), BinaryConv2d(32, 8, 3)).eval()
    files = []
    for i in range(6):
        save_converted(convert(model, torch.ones(2, 3, 8, 8)), tmp_path / str(i))
        files.append((tmp_path / str(i)).read_bytes())
    assert len(set(files)) == 1
    length = int.from_bytes(files[0][:8], "little")
    names = list(json.loads(files[0][8:8 + length])["__metadata__"])
    assert names == sorted(names) and not length % 8


def test_there_and_back(network, file):
    loaded = load_converted(file)
    with pytest.raises(RuntimeError, match=r"3, 32, 32\), as in the example_inputs"):
        loaded(torch.randn(3, 3, 64, 64))
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(x), network(x))
    assert loaded.report == network.report
    assert loaded.state_dict().keys() == network.state_dict().keys()
    save_converted(loaded, file)
    assert torch.equal(load_converted(file)(x), network(x))


def test_trees_go_along(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(conv(32, 32), norm(32))

        def forward(self, pair, factor):
            return {"sum": self.layer(pair["a"]) + pair["b"], "rest": (pair["a"] * factor, 3)}

    x = torch.randn(2, 32, 4, 4)
    inputs = ({"a": x, "b": x + 1}, torch.ones(()))
    network = convert(shuffled(Named()), inputs)
    save_converted(network, tmp_path / "n")
    got, expected = load_converted(tmp_path / "n")(*inputs), network(*inputs)
    assert got.keys() == expected.keys() and torch.equal(got["sum"], expected["sum"])
    assert torch.equal(got["rest"][0], expected["rest"][0]) and got["rest"][1] == 3
    with pytest.raises(RuntimeError, match="must be those of the example_inputs"):
        network(x)


def test_a_published_network_is_small(tmp_path):
    """Larq counts 4,368,032 bytes of weights in QuickNet; the file may have 2 % more."""
    converted = convert(models.create_model("quicknet"), torch.randn(1, 3, 64, 64))
    save_converted(converted, tmp_path / "quicknet")
    assert (tmp_path / "quicknet").stat().st_size <= 1.02 * 4_368_032


def rewritten(file, change):
    """The file with a change to its metadata."""
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    change(metadata, tensors)
    safetensors.save_file(tensors, file, metadata=metadata)


def graph(change):
    def on(metadata, tensors):
        described = json.loads(metadata["graph"])
        change(described)
        metadata["graph"] = json.dumps(described)
    return on


def call(described, name):
    return next(node for node in described["nodes"] if node[1] == name)


def tree(kind, context):
    return json.dumps([1, {"type": kind, "children_spec": [], "context": json.dumps(context)}])


BROKEN = {
    "another format": (lambda m, t: m.update(format="other"), "not one of save_converted"),
    "a later version": (lambda m, t: m.update(format_version="2"), "reads up to 1: update it"),
    "no version": (lambda m, t: m.pop("format_version"), "format version ''"),
    "no graph": (lambda m, t: m.pop("graph"), "is broken: KeyError"),
    "no report": (lambda m, t: m.update(report="{}"), "is broken"),
    "a constant that is not there": (lambda m, t: t.pop(next(iter(t))), "is broken: KeyError"),
    "a constant of another shape": (
        lambda m, t: t.update({k: v[:1] for k, v in t.items() if v.dim() == 4}), "is broken"),
    "an operator that is not there": (
        graph(lambda d: call(d, "aten.max_pool2d.default").__setitem__(1, "aten.no.default")),
        "is broken: AttributeError"),
    "an operator that writes": (
        graph(lambda d: call(d, "aten.linear.default").__setitem__(1, "aten.copy_.default")),
        "a call of aten.copy_.default"),
    "an operator of another library": (
        graph(lambda d: call(d, "aten.linear.default").__setitem__(1, "profiler._record.default")),
        "a call of profiler"),
    "an operator that writes a file": (graph(lambda d: d["nodes"].append(
        ["n", "aten.save.default", [{"node": d["inputs"][0][0]}, "written"], {}])),
        "a call of aten.save.default"),
    "an operator that makes a file": (graph(lambda d: d["nodes"].append(
        ["n", "aten.from_file.default", ["written", True, 64], {}])),
        "a call of aten.from_file.default"),
    "a tree that imports": (graph(lambda d: d.update(out_spec=tree("collections.defaultdict", {
        "default_factory_module": "this", "default_factory_name": "s", "dict_context": []}))),
        "is broken: ValueError: a tree of collections.defaultdict"),
    "an enumeration that imports": (graph(lambda d: d.update(out_spec=tree("builtins.dict", [
        {"__enum__": True, "fqn": "this:s", "name": "s"}]))), "is broken: ValueError: a tree"),
    "sizes that are not those of the example": (
        graph(lambda d: d["inputs"][0][2].__setitem__(3, 31)), "do not fit its example"),
    "a version that is no number": (lambda m, t: m.update(format_version="\u00b2"),
                                    "format version '\u00b2'"),
    "an argument that does not fit": (
        graph(lambda d: call(d, "aten.max_pool2d.default")[2].__setitem__(1, [99, 99])),
        "is broken: RuntimeError"),
    "a node before its source": (graph(lambda d: d["nodes"].reverse()), "is broken: KeyError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused(kind, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    change, says = BROKEN[kind]
    rewritten(file, change)
    with pytest.raises(ValueError, match=says):
        load_converted(file)
    assert "this" not in sys.modules and not (file.parent / "written").exists()


def test_bytes_that_are_wrong(file, tmp_path):
    """Flipped and missing bytes of the header: an error or a network that runs, never a crash."""
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    chosen = random.Random(0)
    for _ in range(25):
        data = bytearray(whole)
        for _ in range(chosen.choice([1, 4])):
            data[chosen.randrange(8 + header)] = chosen.randrange(256)
        file.write_bytes(data if chosen.random() < 0.8 else data[:chosen.randrange(len(data))])
        try:
            load_converted(file)(torch.randn(2, 3, 32, 32))
        except (ValueError, RuntimeError, TypeError):
            pass
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read|can be read"):
        load_converted(file)
    with pytest.raises(ValueError, match="is a folder"):
        load_converted(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_converted(tmp_path / "none")


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta")])
def test_where_it_is_loaded(around, network, file):
    """Also there it is the engine's."""
    with around():
        loaded = load_converted(file)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), network(x))
    assert isinstance(loaded.engine(x), str) == isinstance(network.engine(x), str)


def test_the_file_that_was_there(network, file):
    file.chmod(0o640)
    save_converted(network, file)
    assert file.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe := file.with_name("pipe"))
    with pytest.raises(OSError, match="cannot write: it is a device, a pipe or a socket"):
        save_converted(network, pipe)
    assert pipe.is_fifo() and len(list(file.parent.iterdir())) == 2


Pair = collections.namedtuple("Pair", "a b")


class Paired(nn.Module):
    def forward(self, x):
        return Pair(x + 1, x + 2)


def test_bad_input(network, tmp_path):
    class Counted(nn.Module):
        def forward(self, x):
            return collections.defaultdict(int, a=x + 1)

    with pytest.raises(ValueError, match="cannot hold a tree of collections.defaultdict"):
        save_converted(convert(Counted(), torch.randn(2, 3)), tmp_path / "n")
    network_of_pairs = convert(Paired(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="cannot hold named tuples or other types"):
        save_converted(network_of_pairs, tmp_path / "n")
    pair = network_of_pairs(torch.zeros(3, 3))
    assert isinstance(pair, Pair) and torch.equal(pair.b, torch.full((3, 3), 2.0))
    assert "tuple" not in str(network_of_pairs.engine(torch.zeros(3, 3)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must be what bitkernels.convert"):
        save_converted(nn.Linear(2, 2), tmp_path / "n")
    with pytest.raises(OSError, match="cannot write"):
        save_converted(network, tmp_path / "no" / "folder")
    for device in ("none", None, "cuda:99"):
        with pytest.raises(ValueError, match="load_converted: device must be one of torch, got"):
            load_converted(tmp_path / "n", device)
