"""Which pictures an evaluation takes; the command itself is in test_zoo.py, for torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitkernels.cli.evaluate import evaluate
from bitkernels.cli.predict import labels, predict


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


@pytest.mark.parametrize("share", (0, 5))
def test_nan_is_no_answer(share):
    """topk and softmax have one of NaN too."""
    class Broken(nn.Module):
        def forward(self, images):
            out = torch.zeros(len(images), 6)
            out[:, share] = float("nan")
            return out

    with pytest.raises(ValueError, match="the network gives NaN"):
        evaluate(Broken(), Numbered(3), 2)
    with pytest.raises(ValueError, match="the network gives NaN"):
        predict(Broken(), torch.zeros(2, 3, 4, 4), 5)


def test_labels_are_utf_8_with_a_mark_or_not(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("caf\u00e9\r\ntea\r\n\r\n".encode("utf-8-sig"))
    assert labels(str(path), 2) == ["caf\u00e9", "tea"]
    path.write_bytes(b"caf\xe9\ntea\n")
    with pytest.raises(ValueError, match="--labels: cannot read .*labels.txt: 'utf-8' codec"):
        labels(str(path), 2)
