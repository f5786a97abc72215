"""save_packed and load_packed: the same model comes back, or one error lists what differs."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bitkernels.nn as bnn
from bitkernels import _files
from bitkernels.nn import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConvTranspose2d,
    BinaryLayer,
    BinaryLinear,
    PackedConv2d,
    binarize,
    load_packed,
    pack,
    save_packed,
)
from bitkernels_tests.cases import reals

pytestmark = pytest.mark.usefixtures("one_thread")


class Shift(nn.Module):
    """A quantizer with a state of its own."""

    precision = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.rand(()))

    def forward(self, x):
        return torch.where(x < self.shift, -1.0, 1.0)


class Net(nn.Module):
    """All layers, a shared one, a tied parameter, buffers of many kinds."""

    def __init__(self, stride=1, **options):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 36, 3), nn.BatchNorm2d(36))
        self.body = nn.Sequential(
            BinaryConv2d(36, 36, 3, stride, padding="same" if stride == 1 else 1,
                         weight_scale="detached", **options),
            BinaryConvTranspose2d(36, 36, 2, 2, groups=2),
            BinaryConv2d(36, 8, 3, bias=False, input_quantizer=Shift()))
        self.flat = BinaryConv1d(8, 9, 3)
        self.shared = BinaryLinear(9, 9, weight_scale="xnor")
        self.again = self.shared
        self.head, self.tail = nn.Linear(9, 5), nn.Linear(9, 5)
        self.tail.weight = self.head.weight
        self.register_buffer("mask", torch.rand(5) < 0.5)
        self.register_buffer("table", torch.randint(9, (2, 3)).T)
        self.register_buffer("brief", torch.rand(3).bfloat16())
        self.register_buffer("part", self.table[:2])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("unsaved", torch.ones(1), persistent=False)

    def forward(self, x):
        x = self.body(self.stem(x)).mean(2)
        x = self.again(self.shared(self.flat(x).mean(2)))
        return (self.head(x) + self.tail(x) * self.mask) * self.unsaved


def settled(model):
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(reals(4, 3, 8, 8))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    model = pack(settled(Net()))
    path = tmp_path / "net.safetensors"
    save_packed(model, path)
    return model, path


def same(a, b):
    x = reals(2, 3, 8, 8)
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert value.dtype == states[1][key].dtype and torch.equal(value, states[1][key]), key
    assert torch.equal(a(x), b(x))
    assert not b.training and not any(p.requires_grad for p in b.parameters())
    assert not any(isinstance(m, BinaryLayer) for m in b.modules())


def test_the_same_model_is_the_same_bytes(tmp_path):
    packed = pack(Net().eval())
    for i in range(6):
        save_packed(packed, tmp_path / str(i))
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_the_model_comes_back(saved):
    model, path = saved
    torch.manual_seed(5)
    fresh = Net()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = load_packed(str(path), fresh)
    same(model, loaded)
    assert loaded.shared is loaded.again and loaded.tail.weight is loaded.head.weight
    assert fresh.training and isinstance(fresh.shared, BinaryLinear)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    same(model, load_packed(path, pack(Net())))
    same(model, load_packed(path, torch.compile(Net(), backend="eager")))
    save_packed(loaded, path)
    same(model, load_packed(path, Net()))
    save_packed(torch.compile(model, backend="eager"), path)
    same(model, load_packed(path, Net()))


def test_onto_the_meta_device(tmp_path):
    def make():
        return binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 9, 3), nn.BatchNorm2d(9),
                                      nn.Flatten(), nn.Linear(9, 2)))
    model = pack(settled_small(make()))
    save_packed(model, tmp_path / "file")
    with torch.device("meta"):
        fresh = make()
    loaded = load_packed(tmp_path / "file", fresh)
    x = reals(2, 3, 5, 5)
    assert torch.equal(loaded(x), model(x))
    assert all(t.is_meta for t in fresh.state_dict().values())
    os.unlink(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"other")  # the loaded tensors are no views of the file
    assert torch.equal(loaded(x), model(x))
    fresh.register_buffer("unsaved", torch.zeros(1, device="meta"), persistent=False)
    save_packed(model, tmp_path / "file")
    with pytest.raises(ValueError, match="unsaved of Sequential are on the meta device"):
        load_packed(tmp_path / "file", fresh)


def settled_small(model):
    model(reals(4, 3, 5, 5))
    return model.eval()


def test_the_file_is_small_and_says_what_it_is(tmp_path):
    model = pack(nn.Sequential(BinaryConv2d(256, 256, 3, bias=False), nn.BatchNorm2d(256),
                               BinaryLinear(1024, 512, weight_scale="detached")))
    path = tmp_path / "file"
    save_packed(model, path)
    bits = 256 * 256 * 9 + 1024 * 512
    floats = 4 * 256 + 2 * 512
    assert bits / 8 + 4 * floats < path.stat().st_size < bits / 8 + 4 * floats + 3000
    state = load_file(path)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "bitkernels.packed" and metadata["format_version"] == "1"
    assert json.loads(metadata["layers"])["0"]["class"] == "PackedConv2d"
    assert os.listdir(tmp_path) == ["file"]


def test_partly_packed_models(tmp_path):
    def make():
        return nn.Sequential(BinaryConv2d(3, 8, 3), BinaryConv2d(8, 4, 3))
    model = pack(make(), filter=lambda name, _: name == "1")
    save_packed(model, tmp_path / "file")
    loaded = load_packed(tmp_path / "file", make())
    assert [type(m) for m in loaded] == [BinaryConv2d, PackedConv2d]
    x = reals(1, 3, 6, 6)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="0 is a PackedConv2d in the model, not packed in the"):
        load_packed(tmp_path / "file", pack(make()))


@pytest.mark.parametrize("change, differences", [
    (lambda: Net(stride=2), ["body.0: stride=[1, 1] in the file, [2, 2] in the model",
                             "body.0: padding='same' in the file, [1, 1] in the model"]),
    (lambda: Net(pad_value=1), ["body.0: pad_value=0 in the file, 1 in the model"]),
    (lambda: with_(Net(), shared=nn.Linear(9, 9)), [
        "shared is a PackedLinear in the file, a Linear in the model"]),
    (lambda: with_(Net(), shared=None), ["shared is a PackedLinear in the file, not there"]),
    (lambda: with_(Net(), shared=BinaryLinear(9, 8, bias=False), again=None), [
        "shared: out_features=9 in the file, 8 in the model",
        "shared: bias=True in the file, False in the model",
        "shared: scale=True in the file, False in the model",
        "not in the model: shared.bias"]),
    (lambda: with_(Net(), extra=nn.Linear(2, 2), tail=None), [
        "missing in the file: extra.weight", "not in the model: tail.weight"]),
    (lambda: with_(Net(), head=nn.Linear(7, 5)), [
        "head.weight is float32 of shape (5, 9) in the file, float32 of shape (5, 7)"]),
    (lambda: with_(Net(), head=nn.Linear(9, 5).double()), [
        "head.weight is float32 of shape (5, 9) in the file, float64 of shape (5, 9)"]),
    (lambda: with_(Net(), body=Net(input_quantizer=Shift()).body), [
        "body.0: input_quantizer=None in the file, 'Shift' in the model",
        "missing in the file: body.0.input_quantizer.shift"]),
    (lambda: nn.Linear(2, 2), ["body.0 is a PackedConv2d in the file, not there in the model"])])
def test_another_model_is_refused_with_all_differences(saved, change, differences):
    model, path = saved
    other = change()
    modules, state = list(other.modules()), list(other.state_dict())
    with pytest.raises(ValueError, match=f"not of this {type(other).__name__}: ") as error:
        load_packed(path, other)
    for text in differences:
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert list(other.modules()) == modules and list(other.state_dict()) == state


def with_(model, **children):
    for name, child in children.items():
        setattr(model, name, child)
    return model


def test_a_tied_parameter_with_two_values_is_refused(tmp_path):
    model = Net()
    model.tail.weight = nn.Parameter(torch.randn(5, 9))
    save_packed(pack(model), tmp_path / "file")
    with pytest.raises(ValueError, match="head.weight and tail.weight are one tensor in the model"):
        load_packed(tmp_path / "file", Net())


@pytest.mark.parametrize("damage, match", [
    (lambda path: path.write_bytes(path.read_bytes()[:-50]), "not a safetensors file .*whole one"),
    (lambda path: path.write_bytes(path.read_bytes()[:5]), "not a safetensors file"),
    (lambda path: path.write_bytes(b""), "net.safetensors"),
    (lambda path: path.write_bytes(b"x" * 100), "not a safetensors file"),
    (lambda path: save_file({"a": torch.ones(1)}, path), "not one of save_packed: .*None"),
    (lambda path: save_file({"a": torch.ones(1)}, path, {"format": "pt"}), "is 'pt', not"),
    (lambda path: save_file({"a": torch.ones(1)}, path, {
        "format": "bitkernels.packed", "format_version": "2", "bitkernels": "9.1"}),
     "format version '2', written by bitkernels 9.1; this one reads up to 1"),
    (lambda path: save_file({"a": torch.ones(1)}, path, {
        "format": "bitkernels.packed", "format_version": "1", "layers": "[", "aliases": "{}"}),
     "metadata of .* is broken"),
    (lambda path: save_file({"a": torch.ones(1)}, path, {
        "format": "bitkernels.packed", "format_version": "1", "layers": "{}",
        "aliases": "{\"b\": \"c\"}"}), "metadata of .* is broken")], ids=range(9))
def test_broken_and_other_files_are_refused(saved, damage, match):
    _, path = saved
    damage(path)
    with pytest.raises(ValueError, match=match) as error:
        load_packed(path, Net())
    assert "load_packed" in str(error.value)


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for model in (nn.Linear(2, 2), Net()):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no packed layer"):
            save_packed(model, path)
    model = pack(nn.Sequential(BinaryLinear(4, 4)))
    model.register_buffer("extra", torch.zeros(2, 2).to_sparse())
    with pytest.raises(ValueError, match="extra is of layout torch.sparse_coo"):
        save_packed(model, path)
    model.register_buffer("extra", torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="extra is on the meta device"):
        save_packed(model, path)
    with pytest.raises(FileNotFoundError, match="save_packed cannot write.*nowhere"):
        save_packed(pack(nn.Sequential(BinaryLinear(4, 4))), tmp_path / "nowhere" / "file")
    with pytest.raises(FileNotFoundError):
        load_packed(path, model)
    assert not os.listdir(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_packed(model, path), lambda: load_packed(path, model)):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_packed(model, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_two_writers_of_one_file(saved, monkeypatch):
    """As the processes of a run that all save the model: each puts its whole file in place."""
    model, path = saved
    before, put = path.read_bytes(), _files.put
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(t for t in other.buffers() if t.is_floating_point()).add_(1)

    def after_the_other(temporary, to):
        monkeypatch.setattr(_files, "put", put)
        written = threading.Thread(target=save_packed, args=(other, path))
        written.start()
        written.join()
        assert path.read_bytes() != before
        put(temporary, to)

    monkeypatch.setattr(_files, "put", after_the_other)
    save_packed(model, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_options_of_a_block_are_compared(tmp_path):
    def made(relu):
        conv = bnn.BinaryConv2d(8, 8, 3, padding=1, bias=False)
        return nn.Sequential(bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(8), relu=relu)).eval()

    path, x = tmp_path / "block.safetensors", torch.randn(2, 8, 5, 5)
    packed = bnn.pack(made(True))
    bnn.save_packed(packed, path)
    assert torch.equal(bnn.load_packed(path, made(True))(x), packed(x))
    with pytest.raises(ValueError, match="0: relu=True in the file, False in the model"):
        bnn.load_packed(path, made(False))
