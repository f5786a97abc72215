"""Networks for the converter's tests, with statistics and factors that no training would give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bitkernels.nn as bnn
from bitkernels.models.parts import UnscaledBatchNorm2d


def shuffled(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation, every norm, activation and shift with random values of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def fill(t: Tensor | None, low: float, high: float) -> None:
        if t is not None:
            t.data.uniform_(low, high, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            fill(module.running_mean, -2, 2)
            fill(module.running_var, 0.5, 2)
            fill(module.weight, -1.5, 1.5)
            fill(module.bias, -1, 1)
        elif isinstance(module, bnn.RPReLU):
            for t in (module.shift_in, module.slope, module.shift_out):
                fill(t, -0.4, 0.4)
        elif isinstance(module, nn.PReLU):
            fill(module.weight, -0.4, 0.4)
        elif isinstance(module, bnn.RSign):
            fill(module.shift, -0.5, 0.5)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            for t in module.parameters():
                fill(t, -0.3, 0.3)
    return model.eval()


class Two(nn.Module):
    """What `body` and `other` give of one value, put together."""

    def __init__(self, body: nn.Module, other: nn.Module, how: str = "add") -> None:
        super().__init__()
        self.body, self.other, self.how = body, other, how

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.body(x), self.other(x)
        return a + b if self.how == "add" else torch.cat([a, b], 1)


class Factors(nn.Module):
    """(x * a + b) / c - d, vectors of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, start in (("a", 0.7), ("b", -0.2), ("c", -1.3), ("d", 0.4)):
            steps = torch.linspace(start, 2 * start, channels)
            self.register_buffer(name, steps.view(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.a + self.b) / self.c - self.d  # type: ignore[operator]


class WrittenRPReLU(nn.Module):
    """An RPReLU as ReActNet's code writes it: two biases of shape (1, C, 1, 1) and a PReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.linspace(-0.5, 0.5, channels).view(1, channels, 1, 1))
        self.act = nn.PReLU(channels)
        self.after = nn.Parameter(torch.linspace(0.3, -0.3, channels).view(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.before) + self.after


def conv(cin: int, cout: int, kernel: int = 3, **options) -> bnn.BinaryConv2d:
    return bnn.BinaryConv2d(cin, cout, kernel, **{"padding": kernel // 2, "bias": False, **options})


def norm(channels: int, scaled: bool = True) -> nn.Module:
    return nn.BatchNorm2d(channels) if scaled else UnscaledBatchNorm2d(channels)
