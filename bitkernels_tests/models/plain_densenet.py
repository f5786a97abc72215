"""BinaryDenseNet and MeliusNet in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels_tests.models.plain import Layers


def densenet(x: Tensor, w: Layers, counts: tuple[int, ...], dilations: tuple[int, ...],
             small: bool) -> Tensor:
    x = w.conv(x, 1 if small else 2)
    if not small:
        x = w.max_pool(w.norm(x).relu(), 3, 2)
    for section, (count, dilation) in enumerate(zip(counts, dilations, strict=True)):
        if section:
            x = w.norm(x)
            if dilation == 1:
                x = F.max_pool2d(x, 2)
            x = w.conv(x.relu())
        for _ in range(count):
            x = torch.cat([x, w.binary_conv(w.norm(x), 1, dilation)], 1)
    return w.dense(w.norm(x).relu().mean((2, 3)))


def meliusnet(x: Tensor, w: Layers, counts: tuple[int, ...]) -> Tensor:
    x = w.norm(w.conv(x, 2)).relu()
    x = w.norm(w.grouped_conv(x, 4)).relu()
    x = w.norm(w.grouped_conv(x, 8)).relu()
    x = w.max_pool(x, 2, 2)
    for section, count in enumerate(counts):
        if section:
            x = w.conv(w.max_pool(w.norm(x), 2, 2).relu())
        for _ in range(count):
            x = torch.cat([x, w.binary_conv(w.norm(x))], 1)
            x = x + F.pad(w.binary_conv(w.norm(x)), (0, 0, 0, 0, x.shape[1] - 64, 0))
    return w.dense(w.norm(x).relu().mean((2, 3)))
