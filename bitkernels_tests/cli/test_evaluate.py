"""Which pictures an evaluation takes; the command itself is in test_zoo.py, for torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitkernels.cli.evaluate import evaluate


class Numbered(torch.utils.data.Dataset):
    """Pictures that are their own number, of classes that follow one another."""

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key):
        self.taken.append(key[1])
        return torch.full((3, 1, 1), float(key[1])), key[1] // 3


class FirstClasses(nn.Module):
    """Right at first for pictures of class 0, second of class 1."""

    def forward(self, images):
        return -torch.arange(6.0).expand(len(images), 6)


@pytest.mark.parametrize("limit, taken", [
    (None, list(range(18))), (4, [0, 4, 9, 13]), (18, list(range(18))), (99, list(range(18)))])
def test_a_limit_is_spread_over_the_classes(limit, taken):
    pictures = Numbered(18)
    right, count = evaluate(FirstClasses(), pictures, 5, limit=limit)
    assert pictures.taken == taken and count == len(taken)
    assert right == {1: sum(i < 3 for i in taken), 5: sum(i < 15 for i in taken)}
