"""load_weights: files told by content, loaded strictly; a bad file leaves the model alone."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models.weights import checkpoint, public_weights, table
from bitkernels.models.weights import download as download_module

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("one_thread")


class Toy(nn.Module):
    """A binary layer, a norm and a linear layer; its published code had other names."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.conv = bnn.BinaryConv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))

    def published_state(self, state):
        if float(state.get("temperature", 0)) > 1e-7:
            raise ValueError("temperature is 0.5: its weights are not binary yet")
        names = {"bn": "norm", "fc": "head"}
        found = {}
        for key, value in state.items():
            layer, _, name = key.partition(".")
            if key == "binary_conv.weights":  # flat, in the order of the 4-D ones
                found["conv.weight"] = value.reshape(self.conv.weight.shape)
            elif key != "temperature":
                found[f"{names.get(layer, layer)}.{name}"] = value
        return found


def made(**sizes) -> Toy:
    model = Toy(**sizes)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) + (3 if "var" in name else 0))
        else:
            tensor.fill_(7)
    return model.eval()


def published(model: Toy) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    found = {key.replace("norm.", "bn.").replace("head.", "fc."): value
             for key, value in state.items() if not key.startswith("conv.")}
    found["binary_conv.weights"] = state["conv.weight"].reshape(-1, 1)
    return found


def equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(path, match, model: nn.Module | None = None, **options) -> str:
    """The message; the model is as it was."""
    model = made() if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=match) as error:
        models.load_weights(model, path, **options)
    assert equal(model, before)
    return str(error.value)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "optimizer": {}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {k: v.double() for k, v in s.items()},
], ids=["bare", "state_dict", "model", "DataParallel", "compiled", "double"])
@pytest.mark.parametrize("names", [lambda m: m.state_dict(), published], ids=["ours", "published"])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_torch(tmp_path, wrap, names, zipped):
    source, model = made(), made()
    state = {k: v for k, v in names(source).items() if not v.is_floating_point()}
    state = {**names(source), **state}
    torch.save(wrap(state), tmp_path / "model_best.pth.tar",
               _use_new_zipfile_serialization=zipped)
    if any(v.dtype == torch.float64 and "tracked" in k for k, v in wrap(state).items()
           if isinstance(v, torch.Tensor)):
        refused(tmp_path / "model_best.pth.tar", "num_batches_tracked float64, not int64")
        return
    models.load_weights(model, tmp_path / "model_best.pth.tar")
    assert equal(model, source)


def test_a_file_is_told_by_its_content(tmp_path, monkeypatch):
    """Whatever it is called."""
    source = made()
    safetensors.save_file(source.state_dict(), tmp_path / "a.h5")
    torch.save(source.state_dict(), tmp_path / "b.safetensors")
    for name in ("a.h5", "b.safetensors"):
        model = made()
        models.load_weights(model, str(tmp_path / name))
        assert equal(model, source)
    seen = []
    fake = types.ModuleType("keras")
    fake.load = lambda *args, **options: seen.append((args, options))
    monkeypatch.setitem(sys.modules, "bitkernels.models.weights.keras", fake)
    (tmp_path / "c.pth").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    models.load_weights(source, tmp_path / "c.pth", head=False)
    assert seen == [((source, tmp_path / "c.pth"), {"head": False})]


def test_checkpoints_and_weights_of_our_training(tmp_path):
    from bitkernels.train import checkpoint as training

    source = made()
    training.save(tmp_path / "checkpoint.pt", {"identity": {"model": "toy"}, "rows": [(1, 2.0)],
                                               "model": source.state_dict()})
    training.export(tmp_path / "end.safetensors", source.state_dict(), {"model": "toy"})
    for name in ("checkpoint.pt", "end.safetensors"):
        model = made()
        models.load_weights(model, tmp_path / name)
        assert equal(model, source)


def test_numbers_of_numpy_are_read(tmp_path):
    np = pytest.importorskip("numpy")
    source, model = made(), made()
    torch.save({"best": np.float64(70.5), "count": np.int64(3), "state_dict": source.state_dict()},
               tmp_path / "w.pth")
    models.load_weights(model, tmp_path / "w.pth")
    assert equal(model, source)
    torch.save({"best": np.float32(70.5), "state_dict": source.state_dict()}, tmp_path / "w",
               _use_new_zipfile_serialization=False)
    data = (tmp_path / "w").read_bytes()
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):  # before NumPy 2, and since
        (tmp_path / "w").write_bytes(re.sub(rb"numpy\._?core\.multiarray", name, data))
        models.load_weights(made(), tmp_path / "w")


def test_all_differences_are_listed(tmp_path):
    state = made().state_dict()
    del state["norm.bias"], state["head.weight"]
    state["norm.weight"] = torch.ones(9)
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    state["extra.a"] = state["extra.b"] = torch.ones(1)
    torch.save(state, tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth", "does not hold the weights of this Toy")
    for part in ("2 missing: norm.bias, head.weight;", "2 unknown: extra.a, extra.b;",
                 "1 of another shape: norm.weight (9,), not (8,);",
                 "1 of another kind of number: norm.num_batches_tracked float32, not int64"):
        assert part in message
    safetensors.save_file({f"k{i}": torch.ones(1) for i in range(30)}, tmp_path / "w")
    message = refused(tmp_path / "w", r"30 unknown: k0\., k1\., .* and 22 more")
    assert "8 missing: " in message


@pytest.mark.parametrize("key", list(published(made())))
def test_each_missing_or_misshaped_key_of_a_published_checkpoint(tmp_path, key):
    state = published(made())
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "1 missing: ")
    torch.save({**state, key: state[key].new_zeros(3, 3, 3)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "1 of another shape: |is not a checkpoint of Toy that can be used")


def test_published_names_that_are_mostly_ours(tmp_path):
    source, model = made(), made()
    state = {k.replace("head.", "fc."): v for k, v in source.state_dict().items()}
    torch.save(state, tmp_path / "w")
    models.load_weights(model, tmp_path / "w")
    assert equal(model, source)
    del state["norm.weight"]
    torch.save({**state, "temperature": torch.tensor(0.5)}, tmp_path / "w")
    refused(tmp_path / "w", "3 missing: norm.weight, head.weight, head.bias; 3 unknown: fc.weight")


def test_what_a_published_checkpoint_has_more(tmp_path):
    state = published(made())
    torch.save({**state, "temperature": torch.tensor(0.0)}, tmp_path / "w.pth")
    models.load_weights(made(), tmp_path / "w.pth")
    torch.save({**state, "temperature": torch.tensor(0.5)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "Toy that can be used: temperature is 0.5")
    torch.save({**state, "layer9.weight": torch.ones(2)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "1 unknown: layer9.weight")


class Code:
    """What its pickle runs leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [
    torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)),
    lambda o, p: torch.save(o, p, _use_new_zipfile_serialization=False)])
@pytest.mark.parametrize("wrap", [lambda c, s: c, lambda c, s: {"state_dict": s, "epoch": c}])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, write, wrap):
    write(wrap(Code(tmp_path / "ran"), made().state_dict()), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"pickle calls (\w+\.mkdir|torch\.storage\.\w+), which is not run")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(made(), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"Toy, which is not run.*model\.state_dict\(\)")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    path = tmp_path / "w"
    if kind == "safetensors":
        safetensors.save_file(made().state_dict(), path)
    else:
        torch.save(made().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    for size in (0, 5, 12, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, "is empty" if not size else "damaged|not all of|neither HDF5")


def test_a_changed_byte_is_noticed(tmp_path):
    """In an archive by its checksums, in the header of safetensors by its grammar."""
    source = made()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    data[data.index(source.head.weight.detach().numpy().tobytes()) + 5] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    refused(tmp_path / "w.pth", "the checksum of .* does not hold")
    safetensors.save_file(source.state_dict(), tmp_path / "w")
    data = bytearray((tmp_path / "w").read_bytes())
    data[data.index(b"data_offsets")] = ord("}")
    (tmp_path / "w").write_bytes(data)
    refused(tmp_path / "w", "damaged safetensors")


def test_files_of_something_else(tmp_path):
    path = tmp_path / "w"
    path.write_text("<!DOCTYPE html><html>a page to log in</html>")
    refused(path, "neither HDF5 .* starts with b'<!DOCTYPE html>")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", "")
    refused(path, "not one of torch.save; it holds model.weights.h5")
    with zipfile.ZipFile(path, "w") as archive:  # as TorchScript's
        for name in ("w/data.pkl", "w/constants.pkl"):
            archive.writestr(name, "")
    refused(path, "is an archive, but not one of torch.save")
    for data, match in (([1], "holds a list"), ({"a": 1, "b": torch.ones(1)}, r"a \(int\)"),
                        ({}, "it is empty"), (torch.ones(3), "holds a Tensor"),
                        ({"head.weight": torch.ones(2).to_sparse()}, "not a plain tensor")):
        torch.save(data, path)
        refused(path, match)


def test_another_head_is_refused_or_left_alone(tmp_path):
    source = made()
    for name, state in (("ours", source.state_dict()), ("published", published(source)),
                        ("without", {k: v for k, v in source.state_dict().items()
                                     if not k.startswith("head.")})):
        path = tmp_path / name
        torch.save(state, path)
        refused(path, r"all but head fits: load_weights\(\.\.\., head=False\)", made(classes=3))
        model = made(classes=3)
        kept = model.head.weight.clone()
        models.load_weights(model, path, head=False)
        assert torch.equal(model.head.weight, kept)
        assert torch.equal(model.conv.weight, source.conv.weight)
        assert torch.equal(model.norm.running_var, source.norm.running_var)
        shape = "of another shape: conv.weight|can be used: shape"
        assert "fits" not in refused(path, shape, made(classes=3, width=4))
        refused(path, shape, made(width=4), head=False)


def test_the_head_has_its_norms():
    model = nn.Sequential(bnn.BinaryConv2d(3, 4, 1), nn.BatchNorm2d(4), bnn.BinaryConv2d(4, 5, 1),
                          nn.BatchNorm2d(5), nn.Flatten())
    assert {key[0] for key in checkpoint.head_keys(model)} == {"2", "3"}
    assert checkpoint.head_keys(models.create("quicknet")) == ["classifier.weight",
                                                               "classifier.bias"]
    assert checkpoint.head_keys(nn.BatchNorm2d(3)) == []


def test_packed_models_and_files(tmp_path):
    packed = bnn.pack(made(), filter=lambda name, layer: True)
    bnn.save_packed(packed, tmp_path / "w")
    refused(tmp_path / "w", r"packed model: use bitkernels\.nn\.load_packed")
    torch.save(made().state_dict(), tmp_path / "w")
    refused(tmp_path / "w", "packed .* load them first, then pack", packed)
    with pytest.raises(TypeError, match="model must be an nn.Module, got type"):
        models.load_weights(Toy, tmp_path / "w")


def test_other_dtypes_devices_and_wrappers(tmp_path):
    source = made()
    torch.save(source.state_dict(), tmp_path / "w")
    half = made().half().train()
    models.load_weights(half, tmp_path / "w")
    assert half.training and torch.equal(half.head.weight, source.head.weight.half())
    with torch.device("meta"):
        hollow = Toy().half()
    hollow.head.weight.requires_grad_(False)
    models.load_weights(hollow, tmp_path / "w")
    assert hollow.conv.weight.dtype == torch.float16 and not hollow.head.weight.requires_grad
    assert torch.equal(hollow.conv.weight, source.conv.weight.half())
    inside = made()
    for wrapped in (torch.compile(inside, backend="eager"), nn.DataParallel(inside)):
        inside.head.weight.data.zero_()
        models.load_weights(wrapped, tmp_path / "w")
        assert equal(inside, source)
    with torch.device("meta"):
        lost = Toy()
        lost.register_buffer("blur", torch.ones(3), persistent=False)
    with pytest.raises(ValueError, match="Toy is on the meta device, and blur would get no"):
        models.load_weights(lost, tmp_path / "w")
    with torch.device("meta"):
        headless = Toy()
    with pytest.raises(ValueError, match="head.weight, head.bias would get no values"):
        models.load_weights(headless, tmp_path / "w", head=False)
    assert headless.conv.weight.is_meta
    assert lost.head.weight.is_meta


def test_a_model_that_cannot_be_copied(tmp_path):
    """Its hooks, or it itself, hold results with a gradient, as of a teacher listened to."""
    class Listener:
        def keep(self, module, args, output):
            self.kept = output

    source, model, listener = made(), made(), Listener()
    model.norm.register_forward_hook(listener.keep)
    model.result = model(torch.ones(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    torch.save(source.state_dict(), tmp_path / "w")
    models.load_weights(model, tmp_path / "w")
    assert equal(model, source) and model.norm._forward_hooks


def test_modules_that_read_older_names(tmp_path):
    class Renamed(Toy):
        def _load_from_state_dict(self, state, prefix, *args):
            if f"{prefix}old" in state:
                state[f"{prefix}scale"] = state.pop(f"{prefix}old")
            super()._load_from_state_dict(state, prefix, *args)

    model = Renamed()
    model.scale = nn.Parameter(torch.zeros(2))
    state = {**made().state_dict(), "old": torch.ones(2)}
    torch.save(state, tmp_path / "w")
    models.load_weights(model, tmp_path / "w")
    assert model.scale.tolist() == [1, 1]
    torch.save({**state, "old": torch.ones(3)}, tmp_path / "w")
    refused(tmp_path / "w", "1 refused: size mismatch for scale", model)


def test_create_model_loads(tmp_path):
    sizes = dict(num_classes=3, blocks=(1, 1), filters=(32, 64))
    source = models.create_model("quicknet_small", **sizes)
    torch.save(source.state_dict(), tmp_path / "w")
    assert equal(models.create_model("quicknet_small", **sizes, weights=tmp_path / "w"), source)


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file none\.h5.*quicknet\.larq, "):
        models.load_weights(made(), "none.h5")
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        models.load_weights(made(), tmp_path)


def test_public_names(tmp_path, monkeypatch):
    source, model, seen = made(), made(), []
    torch.save(source.state_dict(), tmp_path / "w")

    def download(url, *, sha256):
        seen.append((url, sha256))
        return tmp_path / "w"

    monkeypatch.setattr(download_module, "download", download)
    models.load_weights(model, "quicknet.larq_notop")
    assert equal(model, source)
    models.load_weights(model, "quicknet")  # the first of this network
    bare, whole = table.find("quicknet.larq_notop"), table.find("quicknet.larq")
    assert seen == [(bare.url, bare.sha256), (whole.url, whole.sha256)]
    with pytest.raises(FileNotFoundError, match="by a browser only, from https://drive.google"):
        models.load_weights(model, "bnext_l")
    assert len(seen) == 2


def test_the_table_of_public_weights():
    rows = public_weights()
    assert len({row.name for row in rows}) == len(rows) == 35
    assert len({row.url for row in rows if row.url}) == 28
    for row in rows:
        assert row.kind == ("keras" if row.url else "torch") and row.page.startswith("https://")
        assert row.name.startswith(f"{row.model}.") and row in public_weights(row.model)
        if row.url:
            assert re.fullmatch(r"[0-9a-f]{64}", row.sha256) and row.licence == "Apache-2.0"
            assert row.head != row.url.endswith("_notop.h5")
    # By the documents of Larq Zoo.
    assert table.find("quicknet.larq").sha256.startswith("8aba9e4e")
    assert table.find("binary_densenet37_dilated.larq").sha256.startswith("15c1bcd7")
    for name in set(models.list_models()) & {row.model for row in rows if row.kind == "keras"}:
        entry = models.registry.entry(name)
        row = table.find(name)
        assert (row.top1, row.top5, row.preprocessing) == (entry.top1, entry.top5,
                                                          entry.preprocessing)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    safetensors.save_file(made().state_dict(), tmp_path / "w")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="need safetensors, .*: pip install safetensors$"):
        models.load_weights(made(), tmp_path / "w")
