"""Inputs of the operators' samples: random, the same in every run, and exact.

Real values are multiples of 1/4, so that every sum of them is exact in any order, with 0, -0.0 and
the edges of clips among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitkernels.ops._contract import pack_bits


class Sample(NamedTuple):
    """One call of an operator, by its arguments.

    overload: its name, "" for the default one.
    kernel: with a dict, even an empty one, GPU kernels are checked by this call at their first use;
        it holds what their call has in place of what `check` gives. Each such sample compiles
        kernels: few, and the last one the largest.
    """

    args: tuple
    kw: dict[str, Any] = {}
    overload: str = ""
    kernel: dict[str, Any] | None = None


class Values:
    """Inputs from a generator of their own: the global one is not touched."""

    def __init__(self) -> None:
        self.generator = torch.Generator("cpu").manual_seed(7)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator, device="cpu")

    def real(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = self.integers(-16, 17, *shape) / 4
        return torch.where(x == 0.25, -0.0, x).to(dtype)

    def leaf(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `real`, requiring a gradient."""
        return self.real(*shape, dtype=dtype).requires_grad_()

    def words(self, *shape: int) -> Tensor:
        """Random signs (..., channels) as words."""
        return pack_bits(self.integers(0, 2, *shape).bool())

    def epilogue(self, shape: tuple[int, ...], channels: int) -> dict[str, Any]:
        """Every part of an epilogue with both outputs."""
        names = ("scale", "bias", "shift_in", "slope", "shift_out", "sign_shift")
        return dict(clamp_min=-20.0, clamp_max=25.0, dtype=torch.float16,
                    residual=self.real(*shape, dtype=torch.float16),
                    **{name: self.real(channels) for name in names})


def channels_last(t: Tensor) -> Tensor:
    """The same in channels-last memory, requiring a gradient as t does."""
    return t.detach().to(memory_format=torch.channels_last).requires_grad_(t.requires_grad)
