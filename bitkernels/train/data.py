"""Image sets: digits, a generated set, CIFAR, folders of pictures.

Everything random about an image depends on the seed, the epoch and its index alone. So it does not
matter how many workers load it, which process does, or whether the run was interrupted before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from bitkernels.models.preprocessing import PREPROCESSING, Preprocessing
from bitkernels.ops._checks import describe
from bitkernels.train.errors import DataError, first_line

__all__ = ["Batches", "Data", "Pictures", "Source", "loader"]

Transform = Callable[[Any], Tensor]


class Source(Protocol):
    """Images with labels, by index: a dataset of torchvision without transforms, or `Tensors`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class Tensors:
    """Images (N, C, H, W) and labels (N,), integers, in memory.

    Raises DataError for labels of another shape or type.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise DataError(f"labels must be integers of shape ({len(images)},), one for each "
                            f"image, got {describe(labels)}")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def first(self, count: int) -> Tensors:
        """The first images alone."""
        return Tensors(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Data:
    """An image set.

    train, held_out: images with labels from 0 to classes - 1, before any transform.
    plain: the transform for evaluation, to a tensor (channels, size, size).
    augmented: transforms for training by the names that `Stage.augmentation` takes.
    preprocessing: what `plain` is of pictures, one of `bitkernels.models.preprocessing` at some
      size; None: the images are no pictures, or go through something else.
    labels: names of the classes.
    """

    name: str
    classes: int
    channels: int
    size: int
    train: Source
    held_out: Source
    plain: Transform
    augmented: Mapping[str, Transform]
    preprocessing: Preprocessing | None = None
    labels: Sequence[str] | None = None

    def augmentation(self, name: str) -> Transform:
        """Raises DataError for one that this set does not have."""
        if name == "none":
            return self.plain
        if name not in self.augmented:
            raise DataError(f"{self.name} has no augmentation {name!r}; it has "
                            f"{', '.join(['none', *self.augmented])}")
        return self.augmented[name]

    def check(self) -> None:
        """Raises DataError for parts without images, and for a first image that is none after the
        transform; one that cannot be read is an error in its turn. For labels that are not one a
        class, and a preprocessing that is none of the package's."""
        if self.labels is not None and len(self.labels) != self.classes:
            raise DataError(f"labels of {self.name} must be one for each of {self.classes} "
                            f"classes, got {len(self.labels)}")
        rule = self.preprocessing
        known = None if rule is None else PREPROCESSING.get(rule.name)
        if rule is not None and (known is None or known.at(rule.size) != rule):
            raise DataError(f"preprocessing of {self.name} must be one of "
                            f"{', '.join(PREPROCESSING)}, at any size, got another {rule.name!r}")
        for what, source in (("training", self.train), ("held-out", self.held_out)):
            if not len(source):
                raise DataError(f"{self.name} has no {what} images")
            first = Pictures(source, self.plain)[0, 0]
            image = None if isinstance(first, DataError) else first[0]
            if image is not None and not (
                    isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3
                    and image.shape[0] == self.channels):
                got = describe(image) if isinstance(image, Tensor) else type(image).__name__
                raise DataError(f"{what} images of {self.name} must be real and of shape "
                                f"({self.channels}, {self.size}, {self.size}) behind the "
                                f"transform, got {got}")


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """torch's generator of the CPU, in a state of its own."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int.from_bytes(digest, "little"))
    try:
        yield
    finally:
        generator.set_state(state)


class Pictures(Dataset):
    """A source with a transform, indexed by (epoch, index).

    A picture that cannot be read becomes a DataError in its place, which `loader` raises: an error
    raised in a worker process would arrive wrapped in that worker's traceback.
    """

    def __init__(self, source: Source, transform: Transform, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | DataError:
        epoch, index = key
        try:
            image, label = self.source[index]
        except Exception as error:  # each picture format raises its own
            paths = getattr(self.source, "samples", None)
            where = paths[index][0] if paths else f"image {index}"
            return DataError(f"cannot read {where}: {first_line(error)}")
        with _seeded(self.seed, epoch, index):
            return self.transform(image), label


class Batches(Sampler):
    """The batches of an epoch from a position on, as lists of (epoch, index).

    The order is a permutation given by seed and epoch. Each process gets its part of every batch;
    the parts joined in the order of ranks are the batch of a single process. The last images that
    do not fill a batch are left out, other ones in each epoch.

    Raises DataError where there are fewer images than one batch, or the processes cannot share one.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0,
                 size: int = 1) -> None:
        if batch_size > count:
            raise DataError(f"a batch of {batch_size} images is larger than the set, which has "
                            f"{count}")
        if batch_size % size:
            raise DataError(f"a batch of {batch_size} images cannot be shared by {size} processes")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.part = slice(rank * batch_size // size, (rank + 1) * batch_size // size)
        self.epoch = self.start = 0

    @property
    def steps(self) -> int:
        """Batches in a whole epoch."""
        return self.count // self.batch_size

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.start, self.steps):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch[self.part]]


def held_out_batches(count: int, batch_size: int, rank: int = 0,
                     size: int = 1) -> list[list[tuple[int, int]]]:
    """All images in order, this process's share of them."""
    mine = range(rank, count, size)
    return [[(0, index) for index in mine[i:i + batch_size]]
            for i in range(0, len(mine), batch_size)]


def loader(pictures: Pictures, batches: Any, workers: int, pin: bool) -> Iterator[list[Tensor]]:
    """Images and labels, batch by batch. Raises DataError for a picture that cannot be read."""
    # A generator of its own: the loader would draw from torch's otherwise.
    for batch in DataLoader(pictures, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                            collate_fn=_collate, generator=torch.Generator()):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    return default_collate(samples)


class Shift:
    """A tensor image moved by up to an eighth of its size along both axes, and perhaps mirrored.

    What moves in is `fill`. Source of 4 pixels at 32 and of the mirroring: the CIFAR-10 training of
    most papers.
    """

    def __init__(self, fill: float, mirror: bool = False) -> None:
        self.fill, self.mirror = fill, mirror

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        down, right = height // 8, width // 8
        top = int(torch.randint(0, 2 * down + 1, ()))
        left = int(torch.randint(0, 2 * right + 1, ()))
        padded = F.pad(image, (right, right, down, down), value=self.fill)
        moved = padded[..., top:top + height, left:left + width]
        return moved.flip(-1) if self.mirror and torch.rand(()) < 0.5 else moved
