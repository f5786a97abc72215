"""Metrics of real values: saturation before a sign, histograms."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._arguments import integer, number
from bitkernels.metrics.base import NAN, Metric, accumulate, packed_within, popcount

__all__ = ["Histogram", "Saturation"]


class Saturation(Metric):
    """Share of the values before a sign that get no straight-through gradient: not |x| <= clip.

    update(x): x of any shape and real dtype; NaN counts as saturated. value: over all values since
    the last reset, NaN if there was none. Source: AdamBNN. Raises ValueError for a negative clip.
    """

    _state = ("_saturated", "_count")
    _saturated: Tensor | int
    _count: int

    def __init__(self, clip: float = 1.0) -> None:
        self.clip = number("Saturation", "clip", clip, 0, finite=False)
        self.reset()

    def update(self, x: Tensor) -> None:
        if x.dim() == 4 and not x.is_contiguous():
            x = x.permute(0, 2, 3, 1)  # the order is of no matter: no copy of channels-last
        saturated = x.numel() - popcount(packed_within(x, self.clip))
        self._saturated = accumulate(self._saturated, saturated)
        self._count += x.numel()

    def reset(self) -> None:
        self._saturated = 0
        self._count = 0

    @property
    def value(self) -> float:
        return int(self._saturated) / self._count if self._count else NAN


class Histogram(Metric):
    """Counts in `bins` equal bins of [low, high], and of what lies below and above; NaN nowhere.

    update(x): x of any shape and real dtype, added to the counts. value: int64 counts (bins,);
    below, above: counts; edges: the bins' bounds (bins + 1,). Raises ValueError for fewer than one
    bin or an empty range.
    """

    _state = ("bins", "low", "high", "_counts", "_outside")
    _counts: Tensor | int
    _outside: Tensor | int
    _CHUNK = 1 << 24  # histc counts in float32, which is exact to this many

    def __init__(self, bins: int = 64, low: float = -2.0, high: float = 2.0) -> None:
        self.bins = integer("Histogram", "bins", bins)
        self.low = number("Histogram", "low", low)
        self.high = number("Histogram", "high", high)
        if not self.low < self.high:
            raise ValueError(f"Histogram: high must be above low, got {self.high} and {self.low}")
        self.reset()

    def update(self, x: Tensor) -> None:
        x = x.detach()
        if x.dim() == 4 and not x.is_contiguous():
            x = x.permute(0, 2, 3, 1)
        for part in x.reshape(-1).split(self._CHUNK):
            part = part if part.dtype == torch.float64 else part.float()
            counts = torch.histc(part, self.bins, self.low, self.high).long()
            outside = torch.stack([(part < self.low).sum(), (part > self.high).sum()])
            self._counts = accumulate(self._counts, counts)
            self._outside = accumulate(self._outside, outside)

    def reset(self) -> None:
        self._counts = self._outside = 0

    @property
    def value(self) -> Tensor:
        if isinstance(self._counts, Tensor):
            return self._counts
        return torch.zeros(self.bins, dtype=torch.int64)

    @property
    def below(self) -> int:
        return int(self._outside[0]) if isinstance(self._outside, Tensor) else 0

    @property
    def above(self) -> int:
        return int(self._outside[1]) if isinstance(self._outside, Tensor) else 0

    @property
    def edges(self) -> Tensor:
        return torch.linspace(self.low, self.high, self.bins + 1)
