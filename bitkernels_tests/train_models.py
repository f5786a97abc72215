"""Networks that the tests of training give to the command line as module:function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitkernels import models


class Double(nn.Module):
    """A network of float64 for images of float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()
        self.attention_layers = tuple(f"network.{name}" for name in network.attention_layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double())


def double_reactnet(num_classes: int) -> nn.Module:
    return Double(models.create("reactnet", num_classes=num_classes, in_channels=1, image_size=8,
                                channels=(8, 16)))


class Noisy(nn.Module):
    """Binary layers, batch norm, dropout, and a use of Python's and numpy's random numbers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = models.create("reactnet", num_classes=num_classes, in_channels=1,
                                     image_size=8, channels=(4, 8))
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        import random

        import numpy as np

        if self.training:
            images = images + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.network(self.dropout(images))


def exploding(num_classes: int) -> nn.Module:
    """Its weights are no numbers after the first update."""
    network = Noisy(num_classes)
    network.network.classifier.weight.register_hook(lambda grad: grad * torch.inf)
    return network


def tanh_teacher(num_classes: int) -> nn.Module:
    """The small ReActNet of the tests as the stage "teacher" trains it."""
    from bitkernels.train import recipes
    from bitkernels.train.stages import configure

    network = models.create("reactnet", num_classes=num_classes, in_channels=1, image_size=8,
                            channels=(4, 8))
    configure(network, recipes.get("adambnn-digits").stages[0])
    return network
