"""bitkernels.models.preprocessing: Larq Zoo's values, the pipelines of the others, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitkernels import models
from bitkernels.models import preprocessing
from bitkernels.models.registry import entry

AT = [(0, 0, 0), (0, 223, 1), (17, 101, 2), (112, 112, 0), (150, 33, 1), (223, 223, 2)]
# larq_zoo.preprocess_input of Larq Zoo 2.4 and TensorFlow 2.21, of `picture`: the values at AT
# (row, column, channel), and the mean magnitude of all.
LARQ_ZOO = {
    (300, 401): ([0.947427, -1.631875, 0.142691, 1.39267, 0.800035, 1.802619], 0.93875177),
    (97, 61): ([-0.542427, -1.607803, -0.311255, 1.007364, -0.632094, 2.07438], 0.93920633),
}


def picture(height: int, width: int) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :3]
    return ((37 * y * y + 11 * x * x + 5 * x * y + 91 * c) % 256).astype(np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :3]
    return (127 + 100 * np.sin(y / 23 + c) * np.cos(x / 31)).astype(np.uint8)


@pytest.mark.parametrize("size", LARQ_ZOO)
def test_larq_zoo_to_the_last_digits(size):
    expected, magnitude = LARQ_ZOO[size]
    found = preprocessing.get("larq").array(picture(*size))
    assert found.shape == (3, 224, 224) and found.dtype == torch.float32
    values = [float(found[channel, row, column]) for row, column, channel in AT]
    assert values == pytest.approx(expected, abs=2e-6)  # float32 rounding at values up to 2.6
    assert float(found.abs().double().mean()) == pytest.approx(magnitude, abs=1e-7)
    assert torch.equal(found, preprocessing.get("larq").array(torch.from_numpy(picture(*size))))


def test_tensorflow_bicubic_is_the_identity_at_its_own_size():
    image = torch.rand(2, 7, 7)
    assert torch.equal(preprocessing.tensorflow_bicubic(image, 7), image)
    constant = preprocessing.tensorflow_bicubic(torch.full((1, 5, 9), 3.0), 16)
    assert constant.shape == (1, 16, 16) and torch.allclose(constant, torch.tensor(3.0), rtol=1e-6)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I of a PNG"])
def test_grey_of_16_bits_keeps_its_upper_8(mode):
    """PIL's convert("RGB") makes white of all above 255."""
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(65536).reshape(256, 256)
    raw = "I;16B" if mode == "I;16B" else "I;16"
    found = image.frombytes(raw, (256, 256), grey.astype(">u2" if raw[-1] == "B" else "<u2"))
    if mode == "I of a PNG":
        found = found.convert("I")
        found.format = "PNG"
    pixels = np.asarray(preprocessing.rgb(found))
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.stack([grey >> 8] * 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_without_a_range_are_refused(mode):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=f"mode '{mode}' have no range: save it with 8 or 16 bits"):
        preprocessing.rgb(image.new(mode, (2, 2)))


def test_larq_transform_equals_its_array(torchvision):
    from PIL import Image

    for mode in ("RGB", "L", "RGBA", "P"):
        image = Image.fromarray(picture(61, 97)).convert(mode)
        expected = preprocessing.get("larq").array(np.asarray(image.convert("RGB")).copy())
        found = preprocessing.get("larq").transform()(image)
        assert found.shape == (3, 224, 224) and torch.allclose(found, expected, atol=1e-5)


def test_evaluation_of_the_others(torchvision):
    """Against the same steps by torch's antialiased resize, which is PIL's but for rounding."""
    from PIL import Image

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (
        preprocessing.IMAGENET_MEAN, preprocessing.IMAGENET_STD))
    pixels = smooth(300, 400)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()
    for name, short, how in (("imagenet", 256, "bilinear"), ("bnext", 235, "bicubic")):
        found = preprocessing.get(name).transform()(Image.fromarray(pixels))
        long = short * 400 // 300
        scaled = F.interpolate(image[None], (short, long), mode=how, antialias=True)[0] / 255
        top, left = (short - 224) / 2, (long - 224) / 2
        part = scaled[:, round(top):round(top) + 224, round(left):round(left) + 224]
        assert found.shape == (3, 224, 224)
        assert float((found * std + mean - part).abs().max()) < 2 / 255, name
        assert torch.equal(found, preprocessing.get(name).array(pixels))


def test_cifar(torchvision):
    found = preprocessing.get("cifar").array(np.array([[[0, 51, 255]] * 32] * 32, dtype=np.uint8))
    assert torch.allclose(found, torch.tensor([-1.0, -0.6, 1.0]).view(3, 1, 1).expand(3, 32, 32))


@pytest.mark.parametrize("name", preprocessing.PREPROCESSING)
def test_training(name, torchvision):
    from PIL import Image

    rule = preprocessing.get(name).at(48)
    transform = rule.transform(train=True)
    image = Image.fromarray(smooth(80, 120))
    torch.manual_seed(0)
    drawn = [transform(image) for _ in range(4)]
    torch.manual_seed(0)
    again = [transform(image) for _ in range(4)]
    for i, tensor in enumerate(drawn):
        assert tensor.shape == (3, 48, 48) and torch.equal(tensor, again[i])
        assert all(not torch.equal(tensor, other) for other in drawn[:i])
    flat = Image.new("RGB", (80, 120), (200, 100, 50))
    if name != "bnext":  # whose RandAugment changes colours
        value = ((torch.tensor([200, 100, 50]) / 255 - torch.tensor(rule.mean))
                 / torch.tensor(rule.std)).view(3, 1, 1)
        found = transform(flat)
        if name == "cifar":  # zeros move in
            found = found[:, 8:-8, 8:-8]
        assert torch.allclose(found, value.expand_as(found), atol=1e-5)


def test_a_random_part_is_resized_as_a_whole(torchvision):
    from PIL import Image

    rule = preprocessing.get("larq").at(20)
    exact = preprocessing.Preprocessing("x", "", "crop-resize", "tensorflow", size=20,
                                        augmentation=("resized-crop",), area=(1.0, 1.0),
                                        ratio=(1.0, 1.0))
    pixels = smooth(40, 40)
    found = exact.transform(train=True)(Image.fromarray(pixels))
    image = preprocessing.tensorflow_bicubic(torch.from_numpy(pixels).permute(2, 0, 1).float(), 20)
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (rule.mean, rule.std))
    assert torch.allclose(found, (image - mean) / std, atol=1e-5)


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_has_one(name):
    rule = preprocessing.get(entry(name).preprocessing)
    assert rule.size == entry(name).image_size


@pytest.mark.parametrize("call, message", [
    (lambda: preprocessing.get("pets"), "no preprocessing is called 'pets'; there are larq, "),
    (lambda: preprocessing.get("larq").at(0), "size must be an integer of at least 1, got 0"),
    (lambda: preprocessing.get("larq").array(torch.zeros(3, 8, 8)), r"\(H, W, 3\), got shape"),
    (lambda: preprocessing.get("larq").array(torch.zeros(0, 8, 3)), r"got shape \(0, 8, 3\)"),
    (lambda: preprocessing.get("imagenet").array(torch.zeros(8, 8, 3)), "must be uint8"),
    (lambda: preprocessing.Preprocessing("x", "", "resize", "bilinear", augmentation=("y",))
     ._augmented(None), "augmentation 'y'")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
