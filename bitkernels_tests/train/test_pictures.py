"""Folders of pictures and CIFAR, read by torchvision."""

import pickle

import numpy as np
import pytest
import torch

from bitkernels.train import DataError, datasets
from bitkernels.train.data import Pictures, loader

Image = pytest.importorskip("PIL.Image")


pytestmark = pytest.mark.usefixtures("torchvision")


@pytest.fixture
def pictures(tmp_path):
    """Two classes of solid colour, 3 pictures each for training and 1 held out."""
    for part, count in (("train", 3), ("val", 1)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (50, 40), colour).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("augmentation", ["none", "shift-flip", "resized-crop",
                                          "resized-crop-bicubic"])
def test_folder(pictures, augmentation):
    data = datasets.folder(pictures, size=32)
    assert (data.classes, len(data.train), len(data.held_out)) == (2, 6, 2)
    images, labels = next(loader(Pictures(data.train, data.augmentation(augmentation)),
                                 [[(0, 0), (0, 5)]], 0, False))
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [0, 1]
    middle = images[:, :, 16, 16] * torch.tensor(datasets.IMAGENET_STD)
    middle += torch.tensor(datasets.IMAGENET_MEAN)
    assert torch.allclose(middle, torch.tensor([[0.0, 0, 1], [1, 0, 0]]), atol=1e-5)


def test_grey_of_16_bits_is_not_white(pictures):
    Image.fromarray(np.full((40, 50), 0x40FF, np.uint16)).save(pictures / "val" / "red" / "0.png")
    Image.fromarray(np.ones((40, 50), np.float32)).save(pictures / "val" / "blue" / "1.tiff")
    held_out = Pictures(*(getattr(datasets.folder(pictures, size=32), what)
                          for what in ("held_out", "plain")))
    grey = held_out[0, 2][0][:, 16, 16] * torch.tensor(datasets.IMAGENET_STD)
    grey += torch.tensor(datasets.IMAGENET_MEAN)
    assert torch.allclose(grey, torch.tensor(64 / 255), atol=1e-6)
    with pytest.raises(DataError, match="cannot read .*blue/1.tiff: pictures of mode 'F' have no"):
        next(loader(held_out, [[(0, 1)]], 0, False))


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=f"there is no folder {tmp_path}/train"):
        datasets.folder(tmp_path)


def test_empty_folder(pictures):
    for path in (pictures / "val").glob("*/*"):
        path.unlink()
    for path in (pictures / "val").iterdir():
        path.rmdir()
    with pytest.raises(DataError, match=f"{pictures}/val is empty"):
        datasets.folder(pictures)


def test_class_without_pictures(pictures):
    for path in (pictures / "train" / "red").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match=f"{pictures}/train/red has no picture; taken are .jpg"):
        datasets.folder(pictures)


def test_classes_that_differ(pictures):
    (pictures / "val" / "red").rename(pictures / "val" / "green")
    with pytest.raises(DataError, match="do not have the same classes.*green, red"):
        datasets.folder(pictures)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture(pictures, content, workers):
    path = pictures / "train" / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    data = datasets.folder(pictures, size=8)
    with pytest.raises(DataError, match=f"^cannot read {path}: "):
        list(loader(Pictures(data.train, data.plain), [[(0, i)] for i in range(6)], workers, False))


def write_cifar(folder, names, key):
    folder.mkdir()
    for name in names:
        with open(folder / name, "wb") as file:
            pickle.dump({"data": np.full((4, 3072), 255, np.uint8), key: [0, 1, 2, 3]}, file)


def test_cifar10(tmp_path, torchvision, monkeypatch):
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    write_cifar(folder, [name for name, _ in kind.train_list + kind.test_list], "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"] * 10}))
    with pytest.raises(DataError, match=f"no CIFAR-10 in {folder}"):  # the sums do not agree
        datasets.load("cifar10", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = datasets.load("cifar10", str(tmp_path))
    assert (data.classes, len(data.train), len(data.held_out)) == (10, 20, 4)
    images, labels = next(loader(Pictures(data.train, data.plain), [[(0, 3)]], 0, False))
    assert images.shape == (1, 3, 32, 32) and images.unique().tolist() == [1.0]
    assert labels.tolist() == [3]


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=f"no CIFAR-100 in {tmp_path}/cifar-100-python"):
        datasets.load("cifar100", str(tmp_path))
