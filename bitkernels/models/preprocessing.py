"""What the images of each family go through, as data and as torchvision's transforms.

    larq      Larq Zoo: the middle of the image, then TensorFlow's bicubic resize
    imagenet  ReActNet, AdamBNN, Bi-Real Net: the short side to 256, the middle 224, bilinear
    bnext     BNext: the short side to 235, the middle 224, bicubic
    cifar     the CIFAR networks of Bop: values in [-1, 1], 32 x 32

    transform = preprocessing.get("larq").transform()      # of a PIL image, by torchvision
    tensor = preprocessing.get("larq").array(pixels)       # of (H, W, 3) from 0 to 255
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bitkernels._packages import needs

__all__ = ["PREPROCESSING", "Preprocessing", "get", "tensorflow_bicubic"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TABLE = 1024  # TensorFlow rounds a position between two pixels to as many steps


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the network's input, (3, size, size) in float32.

    rule: how evaluation takes its part of a picture:
      "resize-crop": the short side to floor(size / crop), then the middle size x size
      "crop-resize": the middle square, of floor(crop * short side), to size x size
      "resize": all of it to size x size
    interpolation: of every resize; "tensorflow" is `tensorflow_bicubic`, without antialiasing as
      Larq Zoo's; the others are PIL's.
    mean, std: of the channels R, G, B from 0 to 1, subtracted and divided by.
    augmentation: what training does, in this order: "resized-crop" (a random part of `area` and
      `ratio`, resized), "shift" (size / 8 pixels of zeros around, a random crop), "flip" (left and
      right, of every second), "randaugment" (2 of torchvision's operations of magnitude 7 of 10).
    area, ratio: of a random part: its share of the picture, its width over its height.
    source: where it is from, and what is not taken over.
    """

    name: str
    source: str
    rule: Literal["resize-crop", "crop-resize", "resize"]
    interpolation: Literal["bilinear", "bicubic", "tensorflow"]
    size: int = 224
    crop: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    augmentation: tuple[str, ...] = ("resized-crop", "flip")
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def at(self, size: int) -> Preprocessing:
        """The same for another size of the network's images. Raises ValueError below 1."""
        if type(size) is not int or size < 1:
            raise ValueError(f"size must be an integer of at least 1, got {size!r}")
        return replace(self, size=size)

    def transform(self, train: bool = False) -> Any:
        """A torchvision transform from a PIL image, of any mode that `rgb` takes, to the input.

        Raises ImportError that names the package where torchvision is missing.
        """
        t = _transforms()
        steps = [rgb, *(self._augmented(t) if train else self._evaluated(t))]
        if self.interpolation != "tensorflow":
            steps.append(t.ToTensor())
        return t.Compose([*steps, t.Normalize(self.mean, self.std)])

    def array(self, pixels: Any) -> Tensor:
        """The input for evaluation of pixels (H, W, 3), R, G, B from 0 to 255.

        pixels: a tensor or an array; of uint8 where the interpolation is PIL's. Larq Zoo's needs
        torch alone, and agrees with its `preprocess_input` to float32 rounding.

        Raises ValueError for another shape or type.
        """
        pixels = torch.as_tensor(pixels)
        if pixels.dim() != 3 or pixels.shape[-1] != 3 or not pixels.numel():
            raise ValueError(f"pixels must be (H, W, 3), got shape {tuple(pixels.shape)}")
        if self.interpolation != "tensorflow":
            if pixels.dtype != torch.uint8:
                raise ValueError(f"pixels must be uint8 for {self.name}, whose resize is PIL's; "
                                 f"got {pixels.dtype}")
            return self.transform()(_transforms().ToPILImage()(pixels.permute(2, 0, 1)))
        image = pixels.permute(2, 0, 1).float()
        top, left, side = self._middle(*image.shape[1:])
        image = tensorflow_bicubic(image[:, top:top + side, left:left + side], self.size)
        mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        return (image - mean) / std

    def _middle(self, height: int, width: int) -> tuple[int, int, int]:
        """top, left, side of the middle square."""
        side = max(int(self.crop * min(height, width)), 1)
        return (height - side + 1) // 2, (width - side + 1) // 2, side

    def _evaluated(self, t: Any) -> list[Any]:
        if self.rule == "crop-resize":
            return [_Middle(self), *self._resize(t)]
        if self.rule == "resize":
            return self._resize(t)
        return [t.Resize(int(self.size / self.crop), self._how(t)), t.CenterCrop(self.size)]

    def _augmented(self, t: Any) -> list[Any]:
        steps: list[Any] = []
        for name in self.augmentation:
            if name == "resized-crop" and self.interpolation == "tensorflow":
                steps += [_RandomPart(self), *self._resize(t)]
            elif name == "resized-crop":
                steps.append(t.RandomResizedCrop(self.size, self.area, self.ratio, self._how(t)))
            elif name == "shift":
                steps += [*self._resize(t), t.RandomCrop(self.size, padding=self.size // 8)]
            elif name == "flip":
                steps.append(t.RandomHorizontalFlip())
            elif name == "randaugment":
                steps.append(t.RandAugment(2, 7, 11, self._how(t)))
            else:
                raise ValueError(f"{self.name} has an augmentation {name!r} that is not known")
        return steps

    def _resize(self, t: Any) -> list[Any]:
        if self.interpolation == "tensorflow":
            return [_TensorFlow(self.size)]
        return [t.Resize((self.size, self.size), self._how(t))]

    def _how(self, t: Any) -> Any:
        return t.InterpolationMode(self.interpolation)


def rgb(picture: Any) -> Any:
    """A PIL image as one of 8 bits a colour. Of 16 bits of grey the upper 8 are kept, as PIL, and
    TensorFlow too, read 16 bits of colour; PIL's own conversion makes white of all above 255.

    Raises ValueError for grey of 32 bits and for real numbers, of which nothing says what is white.
    """
    # Earlier versions of PIL open a PNG of 16 bits as one of 32.
    if picture.mode.startswith("I;16") or picture.mode == "I" and picture.format == "PNG":
        picture = picture.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
    elif picture.mode in ("I", "F"):
        raise ValueError(f"pictures of mode {picture.mode!r} have no range: save it with 8 or 16 "
                         "bits a colour")
    return picture.convert("RGB")


class _Middle:
    """The middle square of a PIL image."""

    def __init__(self, rule: Preprocessing) -> None:
        self.rule = rule

    def __call__(self, picture: Any) -> Any:
        top, left, side = self.rule._middle(picture.height, picture.width)
        return picture.crop((left, top, left + side, top + side))


class _RandomPart:
    """A random part of a PIL image, as RandomResizedCrop takes it, not yet resized."""

    def __init__(self, rule: Preprocessing) -> None:
        self.rule = rule

    def __call__(self, picture: Any) -> Any:
        top, left, height, width = _transforms().RandomResizedCrop.get_params(
            picture, list(self.rule.area), list(self.rule.ratio))
        return picture.crop((left, top, left + width, top + height))


class _TensorFlow:
    """`tensorflow_bicubic` of a PIL image, to a tensor (3, size, size), 1 where a pixel is 255."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Any) -> Tensor:
        pixels = _transforms().PILToTensor()(picture)
        return tensorflow_bicubic(pixels.float(), self.size) / 255


def tensorflow_bicubic(image: Tensor, size: int) -> Tensor:
    """TensorFlow 1's `resize_bicubic` of (C, H, W) to (C, size, size), in float32.

    Keys's cubic with a = -0.75 at x * side / size, the corner of a pixel and not its middle, the
    border repeated, no antialiasing; a position is rounded to 1/1024 of a pixel. Source: the kernel
    of ResizeBicubic with half_pixel_centers=False, which Larq Zoo's preprocessing calls.
    """
    rows, columns = (_cubic(side, size) for side in image.shape[-2:])
    return (rows @ image.double() @ columns.T).float()


def _cubic(side: int, size: int) -> Tensor:
    """(size, side): what each pixel before adds to each pixel after, float64."""
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(side / size)
    first = position.floor()
    part = (((position - first) * _TABLE).round() / _TABLE).double()
    a = -0.75
    weights = torch.zeros(size, side, dtype=torch.float64)
    for tap in (-1, 0, 1, 2):
        x = (part - tap).abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = (first.long() + tap).clamp(0, side - 1)
        weights.scatter_add_(1, index[:, None], torch.where(x <= 1, near, far)[:, None])
    return weights


def _transforms() -> Any:
    try:
        from torchvision import transforms
    except Exception as error:  # one built for another torch raises RuntimeError
        absent = isinstance(error, ModuleNotFoundError)
        raise ImportError(needs("transforms of pictures", "torchvision",
                                None if absent else error)) from None
    return transforms


PREPROCESSING = {rule.name: rule for rule in (
    Preprocessing("larq", "larq_zoo.training.data; TensorFlow draws the random part by its own "
                          "rule of the same shares and ratios", "crop-resize", "tensorflow"),
    Preprocessing("imagenet", "code of ReActNet, AdamBNN and Bi-Real Net; without their lighting "
                              "of standard deviation 0.1, which changes a pixel by a 255th at most",
                  "resize-crop", "bilinear"),
    Preprocessing("bnext", "code of BNext; timm's RandAugment varies its magnitude by 0.5 a call, "
                           "torchvision's does not", "resize-crop", "bicubic", crop=0.95,
                  augmentation=("resized-crop", "flip", "randaugment")),
    Preprocessing("cifar", "Helwegen et al. 2019 (Bop)", "resize", "bilinear", size=32,
                  mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), augmentation=("shift", "flip")))}


def metadata(rule: Preprocessing | None) -> dict[str, str]:
    """What the metadata of a file of weights say of its network's pictures, for `recorded`."""
    return {} if rule is None else {"preprocessing": rule.name, "size": str(rule.size)}


def recorded(path: str | os.PathLike[str]) -> Preprocessing | None:
    """What the pictures went through that the weights of a safetensors file were trained on; None
    for another file, and where it does not say."""
    try:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    except Exception:  # each its own; who reads the weights says what is wrong
        return None
    return get(about["preprocessing"]).at(int(about["size"])) if "preprocessing" in about else None


def get(name: str) -> Preprocessing:
    """That of a name, as `Entry.preprocessing` has it. Raises ValueError for one there is not."""
    if name not in PREPROCESSING:
        raise ValueError(f"no preprocessing is called {name!r}; there are "
                         f"{', '.join(PREPROCESSING)}")
    return PREPROCESSING[name]
