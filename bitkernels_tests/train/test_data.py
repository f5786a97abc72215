"""Image sets: splits, order, shares of processes, augmentation, and pictures that are broken."""

import builtins
from dataclasses import replace

import pytest
import torch

from bitkernels import models
from bitkernels.models import preprocessing
from bitkernels.train import DataError, DivergedError, TrainError, datasets, fit, recipes
from bitkernels.train.data import Batches, Pictures, Shift, Tensors, held_out_batches, loader

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name, shape, sizes", [("digits", (1, 8, 8), (1437, 360)),
                                                ("generated", (3, 32, 32), (4000, 1000))])
def test_sets_in_memory(name, shape, sizes):
    data, again, other = (datasets.load(name, split=split) for split in (0, 0, 1))
    assert (len(data.train), len(data.held_out)) == sizes
    assert (data.channels, data.size, data.size) == shape == data.train[0][0].shape
    assert torch.equal(data.train.images, again.train.images)
    assert not torch.equal(data.train.images, other.train.images)
    for source in (data.train, data.held_out):
        counts = torch.bincount(source.labels, minlength=data.classes)
        assert len(counts) == data.classes == 10 and counts.min() > 0.9 * counts.max() - 3
    images = torch.cat([data.train.images, data.held_out.images]).flatten(1)
    assert len(images.unique(dim=0)) == sum(sizes)  # nothing is in both


def test_generated_has_its_classes_in_the_images():
    """Matched filters over all phases and places find the class of nearly every clean image."""
    data = datasets.generated(train=200, held_out=100, noise=0.0)
    power = torch.fft.fft2(data.train.images).abs().square().sum(1)
    frequency = torch.fft.fftfreq(32)
    fy, fx = torch.meshgrid(frequency, frequency, indexing="ij")
    scores = []
    for label in range(10):
        angle, width = torch.tensor(label % 5 * torch.pi / 5), 4.0 if label < 5 else 7.0
        y, x = torch.sin(angle) / width, torch.cos(angle) / width
        near = sum(torch.exp(-((fy - s * y) ** 2 + (fx - s * x) ** 2) / (2 * 0.02**2))
                   for s in (1, -1))
        scores.append((power * near).sum((1, 2)))
    assert (torch.stack(scores).argmax(0) == data.train.labels).float().mean() > 0.9


def test_parts_of_the_processes_join_to_the_batch_of_one():
    whole = Batches(103, 12, seed=3)
    parts = [Batches(103, 12, 3, rank, 3) for rank in range(3)]
    for epoch in range(2):
        for batches in (whole, *parts):
            batches.epoch = epoch
        assert list(whole) == [sum(shares, []) for shares in zip(*parts, strict=True)]
    indices = [index for batch in whole for _, index in batch]
    assert len(whole) == 8 and len(set(indices)) == len(indices) == 96
    assert {epoch for batch in whole for epoch, _ in batch} == {1}


def test_batches_go_on_where_they_stopped():
    batches = Batches(100, 7, seed=1)
    batches.epoch = 4
    everything = list(batches)
    batches.start = 5
    assert list(batches) == everything[5:] and len(batches) == 9
    batches.start, batches.epoch = 0, 5
    assert list(batches) != everything


@pytest.mark.parametrize("arguments, message", [
    ((10, 11, 0), "batch of 11 images is larger than the set, which has 10"),
    ((10, 5, 0, 0, 2), "batch of 5 images cannot be shared by 2 processes")])
def test_batches_refuse(arguments, message):
    with pytest.raises(DataError, match=message):
        Batches(*arguments)


def test_held_out_images_are_each_looked_at_once():
    shares = [held_out_batches(23, 4, rank, 3) for rank in range(3)]
    indices = [index for share in shares for batch in share for _, index in batch]
    assert sorted(indices) == list(range(23))


def loaded(workers, batches):
    source = Tensors(torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
                     torch.arange(30))
    return [images for images, _ in loader(Pictures(source, Shift(0.0, True), seed=5), batches,
                                           workers, False)]


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    state = torch.get_rng_state()
    first = loaded(0, [[(2, 7), (2, 8)], [(2, 9), (3, 7)]])
    torch.rand(3)
    again = loaded(2, [[(2, 9), (3, 7)], [(2, 8), (2, 7)]])
    assert torch.equal(first[0], again[1].flip(0)) and torch.equal(first[1], again[0])
    assert not torch.equal(first[0][0], first[1][1])  # the same image in another epoch
    torch.set_rng_state(state)
    loaded(0, [[(0, 0)]])
    assert torch.equal(torch.get_rng_state(), state)


def test_shift_moves_by_up_to_an_eighth():
    image = torch.zeros(1, 32, 32)
    image[0, 10, 20] = 1
    torch.manual_seed(0)
    places = {tuple(Shift(0.0)(image).nonzero()[0].tolist()[1:]) for _ in range(2000)}
    assert places == {(10 + i, 20 + j) for i in range(-4, 5) for j in range(-4, 5)}
    mirrored = {tuple(Shift(0.0, True)(image).nonzero()[0].tolist()[1:]) for _ in range(4000)}
    assert mirrored == {(10 + i, x + j) for i in range(-4, 5) for j in range(-4, 5)
                        for x in (20, 11)}


class Broken:
    samples = [("/pictures/cat/1.png", 0), ("/pictures/cat/2.png", 0)]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 1:
            raise OSError("image file is truncated")
        return torch.zeros(1, 2, 2), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named(workers):
    pictures = Pictures(Broken(), lambda image: image)
    with pytest.raises(DataError) as error:
        list(loader(pictures, [[(0, 0)], [(0, 0), (0, 1)]], workers, False))
    assert str(error.value) == "cannot read /pictures/cat/2.png: image file is truncated"


@pytest.mark.parametrize("arguments, message", [
    (("digit",), "no image set 'digit'; there are digits, generated"),
    (("imagenet",), "imagenet needs the folder of its files"),
    (("digits", "/data"), "digits takes no root")])
def test_load_refuses(arguments, message):
    with pytest.raises(DataError, match=message):
        datasets.load(*arguments)


def test_an_unknown_augmentation_names_those_there_are():
    with pytest.raises(DataError, match="digits has no augmentation 'cutout'; it has none, shift"):
        datasets.digits().augmentation("cutout")


@pytest.mark.parametrize("error", [ImportError("No module named 'torchvision'"),
                                   RuntimeError("operator torchvision::nms does not exist")])
def test_without_torchvision_one_message_says_what_to_do(monkeypatch, tmp_path, error):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == "torchvision":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    for name in ("cifar10", "folder"):
        with pytest.raises(TrainError, match=f"{error}.*install the release that belongs to torch"):
            datasets.load(name, str(tmp_path))


@pytest.mark.parametrize("labels", [torch.zeros(39).long(), torch.rand(40),
                                    torch.zeros(40, 1).long()])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(DataError, match=r"labels must be integers of shape \(40,\).*got "):
        Tensors(torch.zeros(40, 1, 8, 8), labels)


def of_images(change, part="train"):
    data = datasets.generated()
    small = {name: getattr(data, name).first(64) for name in ("train", "held_out")}
    given = small[part]
    return replace(data, **{**small, part: Tensors(change(given.images), given.labels)})


@pytest.mark.parametrize("part", ["train", "held_out"])
@pytest.mark.parametrize("change, got", [
    (lambda x: (x * 9).to(torch.uint8), r"got uint8 of shape \(3, 32, 32\)"),
    (lambda x: x[:, 0], r"got float32 of shape \(32, 32\)"),
    (lambda x: x[:, :1], r"got float32 of shape \(1, 32, 32\)")])
def test_images_of_another_kind_are_refused_before_the_first_step(part, change, got):
    what = "training" if part == "train" else "held-out"
    with pytest.raises(DataError, match=rf"{what} images of generated .*\(3, 32, 32\).*{got}"):
        of_images(change, part).check()


@pytest.mark.parametrize("change, message", [
    ({"labels": ("one", "two")}, "labels of digits must be one for each of 10 classes, got 2"),
    ({"preprocessing": replace(preprocessing.get("cifar"), mean=(0.0, 0.0, 0.0))},
     "one of larq, imagenet, bnext, cifar, at any size, got another 'cifar'"),
    ({"preprocessing": replace(preprocessing.get("cifar"), name="mine")}, "got another 'mine'")])
def test_what_a_training_would_record_wrongly_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(datasets.digits(), **change).check()
    replace(datasets.digits(), preprocessing=preprocessing.get("cifar").at(8)).check()


def test_a_part_without_images_is_refused():
    data = of_images(lambda x: x)
    empty = Tensors(data.held_out.images[:0], data.held_out.labels[:0])
    with pytest.raises(DataError, match="generated has no held-out images"):
        replace(data, held_out=empty).check()


@pytest.mark.parametrize("given, message", [
    (dict(seed="a"), "seed must be an integer from 0 to 4294967295, got 'a'"),
    (dict(seed=-1), "seed must be an integer"), (dict(options={"workers": 1}), "options must be"),
    (dict(recipe="adambnn-digits"), "recipe must be a Recipe"), (dict(data="digits"), "data must"),
    (dict(build=None), "build must be a function")])
def test_arguments_of_fit(given, message):
    data = of_images(lambda x: x)
    whole = dict(build=lambda: models.create("quicknet"), recipe=recipes.get("quicknet-digits"),
                 data=data)
    with pytest.raises(ValueError, match=f"fit: {message}"):
        fit(**{**whole, **given})


def test_images_of_another_precision_are_refused():
    """As of NumPy, whose real numbers have 64 bits."""
    recipe = recipes.get("quicknet-digits").scaled(epochs=1, batch_size=32)
    with pytest.raises(DataError, match="must be float32 as the network's parameters, got float64"):
        fit(lambda: models.create("quicknet", blocks=(1,), filters=(32,)), recipe,
            of_images(lambda x: x.double()))


def test_a_held_out_image_that_is_no_number_ends_the_run():
    """The largest of NaN is the first class, which counted as right or wrong."""
    data = of_images(lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "held_out")
    recipe = recipes.get("quicknet-digits").scaled(epochs=1, batch_size=32)
    with pytest.raises(DivergedError, match="the loss on the held-out images is nan"):
        fit(lambda: models.create("quicknet", blocks=(1,), filters=(32,)), recipe, data)
