"""Larq Zoo's HDF5 files: what loads, and what is refused with the model unchanged."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitkernels import models
from bitkernels import nn as bnn
from bitkernels.models import load_weights
from bitkernels.models.weights import keras
from bitkernels_tests.models.generated import kind_of, weight

h5py = pytest.importorskip("h5py")

CLASSES = 5


def network(**options) -> nn.Module:
    return models.QuickNet(CLASSES, blocks=(1, 1), filters=(8, 16), **options).eval()


def layers(classes: int = CLASSES) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """What Keras writes of that network."""
    def norm(name: str, channels: int, *more: str) -> tuple[str, dict]:
        return name, dict.fromkeys((*more, "moving_mean", "moving_variance"), (channels,))

    full = ("gamma", "beta")
    return [
        ("input_1", {}), ("quant_conv2d_4", {"kernel": (3, 3, 3, 2)}), norm("bn_9", 2, *full),
        ("quant_depthwise_conv2d", {"depthwise_kernel": (3, 3, 2, 1)}), norm("bn_10", 2),
        ("quant_conv2d_5", {"kernel": (1, 1, 2, 8)}), norm("bn_11", 8, *full),
        ("quant_conv2d_6", {"kernel": (3, 3, 8, 8)}), norm("bn_12", 8, *full), ("add", {}),
        ("depthwise_conv2d", {"depthwise_kernel": (3, 3, 8, 1)}),
        ("quant_conv2d_7", {"kernel": (1, 1, 8, 16)}), norm("bn_13", 16, *full),
        ("quant_conv2d_8", {"kernel": (3, 3, 16, 16)}), norm("bn_14", 16, *full),
        ("quant_dense", {"kernel": (16, classes), "bias": (classes,)}), ("activation", {})]


def values(content, seed: int = 1) -> dict[str, np.ndarray]:
    found = {}
    for name, shapes in content:
        for key, shape in shapes.items():
            found[f"{name}/{key}:0"] = weight(seed, len(found), kind_of(name, key), shape)
    return found


def write(path: Path, content=None, arrays=None, root: str = "", chunks: int = 0) -> Path:
    """As Keras' save_weights; root: as its save; chunks: names cut into so many attributes."""
    content = layers() if content is None else content
    arrays = values(content) if arrays is None else arrays
    with h5py.File(path, "w") as file:
        group = file.create_group(root) if root else file
        names = np.array([name.encode() for name, _ in content])
        if chunks:
            for i, part in enumerate(np.array_split(names, chunks)):
                group.attrs[f"layer_names{i}"] = part
        else:
            group.attrs["layer_names"] = names
        for name, shapes in content:
            layer = group.create_group(name)
            layer.attrs["weight_names"] = [f"{name}/{key}:0" for key in shapes]
            for key in shapes:
                layer[f"{name}/{key}:0"] = arrays[f"{name}/{key}:0"]
    return path


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in now)


@pytest.mark.parametrize("form", [dict(), dict(root="model_weights"), dict(chunks=3)])
def test_every_tensor_lands_in_its_place(form, tmp_path):
    model = network()
    load_weights(model, write(tmp_path / "file", **form))
    arrays, state = values(layers()), model.state_dict()

    def file(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[f"{name}:0"])

    for key, expected in {
            "stem.1.weight": file("quant_conv2d_4/kernel").permute(3, 2, 0, 1),
            "stem.5.weight": file("quant_depthwise_conv2d/depthwise_kernel").permute(2, 3, 0, 1),
            "stem.6.running_var": file("bn_10/moving_variance"),
            "sections.0.0.conv.weight": file("quant_conv2d_6/kernel").permute(3, 2, 0, 1),
            "sections.0.0.norm.weight": file("bn_12/gamma"),
            "sections.1.0.norm.bias": file("bn_13/beta"),
            "sections.1.1.norm.running_mean": file("bn_14/moving_mean"),
            "classifier.weight": file("quant_dense/kernel").T,
            "classifier.bias": file("quant_dense/bias")}.items():
        assert torch.equal(state[key], expected), key
    assert not any("blur" in key for key in state)


def test_binarized_kernels_are_as_good_as_latent_ones(tmp_path):
    x, logits = torch.randn(2, 3, 12, 12), []
    for binarized in (False, True):
        arrays = values(layers())
        for name, value in arrays.items():
            if binarized and value.shape[:2] == (3, 3) and value.shape[2] >= 8 and (
                    value.shape[3] >= 8):
                arrays[name] = np.where(value < 0, np.float16(-1), np.float16(1))
        model = network()
        load_weights(model, write(tmp_path / "file", arrays=arrays))
        with torch.no_grad():
            logits.append(model(x))
    assert torch.equal(*logits)


def test_another_blur_is_kept_and_saved(tmp_path):
    arrays = values(layers())
    blur = arrays["depthwise_conv2d/depthwise_kernel:0"] = weight(7, 0, "alpha", (3, 3, 8, 1))
    model, usual = network(), network().state_dict()
    load_weights(model, write(tmp_path / "file", arrays=arrays))
    expected = torch.from_numpy(blur).permute(2, 3, 0, 1)
    assert torch.equal(model.state_dict()["sections.1.0.blur"], expected)
    other = network()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    other.load_state_dict(usual)
    assert other.state_dict().keys() == usual.keys()
    assert torch.equal(other.sections[1][0].blur, network().sections[1][0].blur)


def test_half_precision_and_training_flags_stay(tmp_path):
    model = network().half().train()
    load_weights(model, write(tmp_path / "file"))
    assert model.training and model.classifier.weight.dtype == torch.float16
    kernel = torch.from_numpy(values(layers())["quant_dense/kernel:0"])
    assert torch.equal(model.classifier.weight, kernel.T.half())


def test_slopes_of_prelus_and_convolutions_for_linear_layers(tmp_path):
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.linear = nn.PReLU(3), bnn.BinaryLinear(4, 3)

        def keras_layers(self):
            return [("prelu", self.act), ("conv", self.linear)]

    content = [("p_re_lu_3", {"alpha": (1, 1, 3)}), ("c", {"kernel": (1, 1, 4, 3), "bias": (3,)})]
    toy, arrays = Toy(), values(content)
    keras.load(toy, write(tmp_path / "file", content))
    assert toy.act.weight.tolist() == arrays["p_re_lu_3/alpha:0"].ravel().tolist()
    assert torch.equal(toy.linear.weight, torch.from_numpy(arrays["c/kernel:0"][0, 0]).T)


def test_files_without_a_head(tmp_path):
    notop = [layer for layer in layers() if layer[0] != "quant_dense"]
    path, model = write(tmp_path / "notop", notop), network()
    before = state_of(model)
    with pytest.raises(ValueError, match="has no head .*head=False"):
        load_weights(model, path)
    assert same(model, before)
    load_weights(model, path, head=False)
    assert torch.equal(model.classifier.weight, before["classifier.weight"])
    assert not torch.equal(model.stem[1].weight, before["stem.1.weight"])
    other = network()
    for classes in (CLASSES, 9):
        load_weights(other, write(tmp_path / "full", layers(classes)), head=False)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    assert torch.equal(other.stem[1].weight, model.stem[1].weight)
    with pytest.raises(ValueError, match=r"kernel \(16, 5\) against \(16, 9\)"):
        load_weights(other, tmp_path / "full")


@pytest.mark.parametrize("name, head", [("binary_alexnet", 6), ("xnornet", 3), ("dorefanet", 5),
                                        ("birealnet18", 1), ("binary_resnet_e18", 1),
                                        ("binary_densenet28", 1), ("meliusnet22", 1),
                                        ("real_to_binary_net", 1)])
def test_heads_are_those_of_larq_zoos_files(name, head):
    with torch.device("meta"):
        model = models.create_model(name)
    found = model.keras_layers()
    assert getattr(model, "keras_head", 1) == head
    kind, last = found[-head]
    assert (kind, type(last).__name__) == {
        "binary_alexnet": ("conv", "BinaryLinear"), "xnornet": ("conv", "BinaryConv2d"),
        "dorefanet": ("dense", "BinaryLinear")}.get(name, ("dense", "Linear"))



@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop(7), "13 layers with weights in the file, 14 in the network; sections.0.0.con"),
    (lambda c: c.insert(9, ("c", {"kernel": (3, 3, 8, 8)})), "15 layers with weights in the file"),
    (lambda c: c[7][1].update(kernel=(3, 3, 8, 4)),
     r"sections.0.0.conv \(conv\) and the file's quant_conv2d_6: kernel \(3, 3, 8, 8\) against"),
    (lambda c: c[8][1].pop("gamma"), "beta, gamma, moving_mean, moving_variance against beta, mov"),
    (lambda c: c[1][1].update(bias=(2,)), "kernel against bias, kernel"),
    (lambda c: c[1][1].update(**{"x/kernel": (3, 3, 3, 2)}), "has two tensors kernel"),
])
def test_other_networks_are_refused(change, message, tmp_path):
    content = [(name, dict(shapes)) for name, shapes in layers()]
    change(content)
    model = network()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, write(tmp_path / "file", content))
    assert same(model, before)


def test_differences_are_counted(tmp_path):
    model = models.QuickNet(CLASSES, blocks=(1, 1), filters=(16, 32))
    with pytest.raises(ValueError, match="and [1-9][0-9]* more$"):
        load_weights(model, write(tmp_path / "file"))


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def integers(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        kernel = file["quant_conv2d_6/quant_conv2d_6/kernel:0"][()]
        del file["quant_conv2d_6/quant_conv2d_6/kernel:0"]
        file["quant_conv2d_6/quant_conv2d_6/kernel:0"] = kernel.astype(np.int8)


def linked(path: Path) -> None:
    shutil.copy(path, path.with_name("other"))
    with h5py.File(path, "r+") as file:
        del file["quant_conv2d_6"]
        file["quant_conv2d_6"] = h5py.ExternalLink("other", "/quant_conv2d_6")


def external(path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_bytes(bytes(4 * 576))
    with h5py.File(path, "r+") as file:
        del file["quant_conv2d_6/quant_conv2d_6/kernel:0"]
        file.create_dataset("quant_conv2d_6/quant_conv2d_6/kernel:0", (3, 3, 8, 8), "float32",
                            external=[(str(secret), 0, 4 * 576)])


def nameless(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs["layer_names"]


def headless_layer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["quant_conv2d_6"].attrs["weight_names"]


def missing(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["bn_12/bn_12/beta:0"]


def garbled(path: Path) -> None:
    """A name of a layer that is no text."""
    path.write_bytes(path.read_bytes().replace(b"quant_conv2d_6", b"quant_conv2d_\xff"))


def unnumbered(path: Path) -> None:
    """A dataset of numbers that no type holds: 1 more bit than IEEE's has the exponent."""
    with h5py.File(path, "r+") as file:
        del file["bn_12/bn_12/beta:0"]
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_fields(31, 22, 9, 0, 22)
        kind.set_ebias(1 << 20)
        h5py.h5d.create(file["bn_12/bn_12"].id, b"beta:0", kind, h5py.h5s.create_simple((8,)))


def flattened(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["bn_12"]
        file["bn_12"] = np.zeros(3)
        file["bn_12"].attrs["weight_names"] = ["bn_12/gamma:0"]


def grouped(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["bn_12/bn_12/beta:0"]
        file.create_group("bn_12/bn_12/beta:0")


@pytest.mark.parametrize("damage, message", [
    (truncated, "damaged"), (integers, "kernel holds int8, not reals"),
    (linked, "quant_conv2d_6 in .* is a link to another file"),
    (external, "is stored in another file"), (nameless, "has no attribute layer_names"),
    (headless_layer, "has no attribute weight_names"), (missing, "beta"),
    (flattened, "is no group"), (grouped, "is no tensor"), (garbled, "damaged one: .* codec"),
    (unnumbered, "damaged one: Insufficient precision"),
])
def test_damaged_files_are_refused(damage, message, tmp_path):
    path, model = write(tmp_path / "file"), network()
    before = state_of(model)
    damage(path)
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    assert same(model, before)


def test_networks_that_take_no_such_file(tmp_path):
    path = write(tmp_path / "file")
    for model, message in ((bnn.pack(network()), "packed"), (nn.Linear(2, 2), "has no Linear")):
        with pytest.raises(ValueError, match=message):
            keras.load(model, path)


def test_networks_on_the_meta_device(tmp_path):
    """Kernels, statistics, counters and the fixed blur, which no file has to hold."""
    path, model = write(tmp_path / "file"), network()
    load_weights(model, path)
    torch.save(model.state_dict(), tmp_path / "state")
    x = torch.randn(1, 3, 12, 12)
    for source in (path, tmp_path / "state"):
        with torch.device("meta"):
            hollow = network().half()
        load_weights(hollow, source)
        assert all(t.device == x.device and (t.dtype == torch.float16 or t.dim() == 0)
                   for t in (*hollow.parameters(), *hollow.buffers()))
        with torch.no_grad():
            assert torch.equal(hollow(x.half()), copy.deepcopy(model).half()(x.half()))
    with torch.device("meta"):
        hollow = network()
    with pytest.raises(ValueError, match="meta device, and classifier.weight, classifier.bias wou"):
        load_weights(hollow, path, head=False)
    assert all(t.is_meta for t in hollow.state_dict().values())


def test_without_h5py_the_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        load_weights(network(), path)
