"""The image sets by name. scikit-learn and torchvision are imported by those that need them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitkernels._packages import needs
from bitkernels.models import preprocessing
from bitkernels.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from bitkernels.train.data import Data, Shift, Source, Tensors
from bitkernels.train.errors import DataError, TrainError, first_line

__all__ = ["HELD_OUT", "NAMES", "cifar", "digits", "folder", "generated", "held_out", "load"]

NAMES = ("digits", "generated", "cifar10", "cifar100", "folder", "imagenet")
HELD_OUT = ("imagenet", "folder", "cifar10", "cifar100")  # of `held_out`


def load(name: str, root: str | None = None, size: int | None = None, split: int = 0) -> Data:
    """The image set of that name; `NAMES` lists them.

    root: the folder of the files, for all but digits and generated.
    size: the side of an image, for folder and imagenet (224).
    split: for digits and generated, the seed of what is held out and of what is generated.

    Raises DataError for an unknown name and for files that are missing, TrainError for a library
    that is.
    """
    if name in ("digits", "generated"):
        if root is not None or size is not None:
            raise DataError(f"{name} takes no root and no size (--root, --size)")
        return digits(split) if name == "digits" else generated(split)
    if name not in NAMES:
        raise DataError(f"no image set {name!r}; there are {', '.join(NAMES)}")
    if root is None:
        raise DataError(f"{name} needs the folder of its files (--root)")
    if name.startswith("cifar"):
        return cifar(Path(root), int(name[5:]))
    return folder(Path(root), size or 224, name)


def _in_memory(name: str, images: Tensor, labels: Tensor, held_out: Tensor, fill: float) -> Data:
    train = ~held_out
    return Data(name, int(labels.max()) + 1, images.shape[1], images.shape[2],
                Tensors(images[train], labels[train]), Tensors(images[held_out], labels[held_out]),
                plain=_same, augmented={"shift": Shift(fill), "shift-flip": Shift(fill, True)})


def _same(image: Tensor) -> Tensor:
    return image


def digits(split: int = 0) -> Data:
    """The 1,797 handwritten digits of scikit-learn, (1, 8, 8) in [-1, 1]; a fifth is held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise TrainError(needs("the digits", "scikit-learn")) from None
    images, labels = load_digits(return_X_y=True)
    _, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels,
                               random_state=split)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[test] = True
    return _in_memory("digits", torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1,
                      torch.tensor(labels), held_out, fill=-1.0)


def generated(split: int = 0, train: int = 4000, held_out: int = 1000,
              noise: float = 1.0) -> Data:
    """Ten textures, (3, 32, 32): stripes of 5 directions by 2 widths, under noise and a distractor.

    An image is a stripe pattern of its class in a round window, in a random place, phase and
    colour; the direction varies by up to 6 degrees and the width by 10 %. Over it lie a fainter
    pattern of any direction and normal noise of standard deviation `noise`. Classes follow each
    other evenly. The same split gives the same images.
    """
    count = train + held_out
    generator = torch.Generator().manual_seed(0xB17 + split)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    labels = torch.arange(count) % 10
    pixels = torch.arange(32) - 15.5
    y, x = pixels.view(1, 32, 1), pixels.view(1, 1, 32)

    def stripes(angle: Tensor, width: Tensor) -> Tensor:
        """One pattern an image, in a window, (count, 1, 32, 32); angles in radians."""
        a, w = angle.view(-1, 1, 1), width.view(-1, 1, 1)
        top, left = uniform(-6, 6, 1, 1), uniform(-6, 6, 1, 1)
        window = torch.exp(-((x - left) ** 2 + (y - top) ** 2) / (2 * 7.0**2))
        phase = (x * torch.cos(a) + y * torch.sin(a)) / w + uniform(0, 1, 1, 1)
        return (window * torch.cos(2 * math.pi * phase)).unsqueeze(1)

    def colours(strength: float) -> Tensor:
        colour = torch.randn(count, 3, 1, 1, generator=generator)
        return strength * colour / colour.square().mean(1, keepdim=True).sqrt()

    direction = (labels % 5) * math.pi / 5 + uniform(-1, 1) * math.radians(6)
    width = torch.where(labels < 5, 4.0, 7.0) * uniform(0.9, 1.1)
    images = stripes(direction, width) * colours(1.0)
    images += stripes(uniform(0, math.pi), uniform(4, 7)) * colours(0.4)
    images += noise * torch.randn(count, 3, 32, 32, generator=generator)
    return _in_memory("generated", images, labels, torch.arange(count) >= train, fill=0.0)


def _torchvision() -> Any:
    try:
        import torchvision
        from torchvision import datasets, transforms  # noqa: F401
    except Exception as error:  # one built for another torch raises RuntimeError
        raise TrainError("pictures are read by torchvision, which cannot be imported "
                         f"({first_line(error)}): install the release that belongs to "
                         f"torch {torch.__version__}") from None
    return torchvision


def cifar(root: Path, classes: int) -> Data:
    """CIFAR-10 or CIFAR-100 from `root`, scaled to [-1, 1] as in the paper of Bop.

    Raises DataError where the extracted files are not in `root` or are damaged.
    """
    vision = _torchvision()
    train, held_out = (_cifar(vision, root, classes, train=part) for part in (True, False))
    t = vision.transforms
    scaled = [t.ToTensor(), t.Normalize((0.5,) * 3, (0.5,) * 3)]
    moved = t.RandomCrop(32, padding=4)
    return Data(f"cifar{classes}", classes, 3, 32, train, held_out, t.Compose(scaled), {
        "shift": t.Compose([moved, *scaled]),
        "shift-flip": t.Compose([moved, t.RandomHorizontalFlip(), *scaled])},
        preprocessing.get("cifar"), train.classes)


def _cifar(vision: Any, root: Path, classes: int, train: bool) -> Any:
    kind = vision.datasets.CIFAR10 if classes == 10 else vision.datasets.CIFAR100
    try:
        return kind(root, train=train)
    except RuntimeError as error:
        raise DataError(f"no CIFAR-{classes} in {root / kind.base_folder}: "
                        f"{str(error).split('. You can')[0]}") from None


def held_out(name: str, root: str) -> tuple[Source, Sequence[str]]:
    """The held-out pictures of one of `HELD_OUT`, before any transform, and the classes' names.

    The training images need not be there. Raises DataError and TrainError as `load`.
    """
    if name not in HELD_OUT:
        raise DataError(f"no image set {name!r} of pictures; there are {', '.join(HELD_OUT)}")
    if not Path(root).is_dir():
        raise DataError(f"there is no folder {root}")
    vision = _torchvision()
    if name.startswith("cifar"):
        pictures = _cifar(vision, Path(root), int(name[5:]), train=False)
    else:
        pictures = _image_folder(vision, Path(root) / "val")
    return pictures, pictures.classes


def folder(root: Path, size: int = 224, name: str = "folder") -> Data:
    """Pictures in root/train/CLASS/ and root/val/CLASS/, as ImageNet is laid out.

    Evaluation: the short side to size * 256 / 224, the middle of it, as ReActNet.

    Raises DataError for folders that are missing or without pictures, and for classes that are not
    the same in train and val. A file that is no picture is found when it is read.
    """
    vision = _torchvision()
    train, held_out = (_image_folder(vision, root / part) for part in ("train", "val"))
    if train.classes != held_out.classes:
        differing = sorted({*train.classes} ^ {*held_out.classes})
        raise DataError(f"{root}/train and {root}/val do not have the same classes: only one of "
                        f"them has {', '.join(differing[:5])}")
    t = vision.transforms
    scaled = [t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    mirror, bilinear, bicubic = (t.RandomHorizontalFlip(), t.InterpolationMode.BILINEAR,
                                 t.InterpolationMode.BICUBIC)

    def resized_crop(how: Any) -> Any:
        return t.Compose([t.RandomResizedCrop(size, interpolation=how), mirror, *scaled])

    whole, rule = t.Resize((size, size)), preprocessing.get("imagenet").at(size)
    moved = t.RandomCrop(size, padding=size // 8)
    return Data(name, len(train.classes), 3, size, train, held_out,
                rule.transform(), {
                    "shift": t.Compose([whole, moved, *scaled]),
                    "shift-flip": t.Compose([whole, moved, mirror, *scaled]),
                    "resized-crop": resized_crop(bilinear),
                    "resized-crop-bicubic": resized_crop(bicubic)}, rule, train.classes)


def _image_folder(vision: Any, path: Path) -> Any:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}")
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"{path} is empty: it has no folder for a class")
    extensions = vision.datasets.folder.IMG_EXTENSIONS
    for name in classes:
        if not any(file.suffix.lower() in extensions for file in (path / name).rglob("*")):
            raise DataError(f"{path / name} has no picture; taken are {', '.join(extensions)}")
    return vision.datasets.ImageFolder(path, loader=_picture)


def _picture(path: str) -> Any:
    """As torchvision's loader, but for grey of 16 bits, of which that makes white."""
    from PIL import Image

    with Image.open(path) as picture:
        return preprocessing.rgb(picture)
