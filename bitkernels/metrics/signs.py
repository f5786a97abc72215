"""Metrics of a weight's signs over its updates: flips, distance from the start, dead weights."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._arguments import integer, number
from bitkernels.metrics.base import (
    NAN,
    Metric,
    accumulate,
    packed_signs,
    packed_within,
    popcount,
)

__all__ = ["C2IRatio", "DeadWeights", "FlipRatio"]


class _SignMetric(Metric):
    """Compares the signs of a tensor with stored ones. Holds the check that it is the same one."""

    size = 0
    _reference: Tensor | None = None

    def _checked(self, x: Tensor) -> Tensor:
        if self._reference is not None and x.numel() != self.size:
            raise ValueError(f"{type(self).__name__}: the first tensor had {self.size} elements, "
                             f"this one has {x.numel()}")
        self.size = x.numel()
        return packed_signs(x)

    def _flips(self, words: Tensor) -> Tensor:
        assert self._reference is not None
        return popcount(words ^ self._reference.to(words.device))


class FlipRatio(_SignMetric):
    """Share of the signs that changed from one update to the next.

    update(x): x of any shape and real dtype, the same one each time. last: the share of the last
    update, NaN after the first one ever. value: the mean of these since the last reset, which is
    0 before there is one. As in Larq, an update that is the first after a reset (or ever) does not
    enter the mean, and reset keeps the signs, so that `last` goes on without a gap. With x all
    binary weights this is AdamBNN's FF ratio, and Bop's pi is log(last + e^-9).

    Raises ValueError for an x of another size.
    """

    _state = ("size", "_reference", "_last", "_total", "_count")

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._total: Tensor | int = 0
        self._count = 0

    def update(self, x: Tensor) -> None:
        self._update(self._checked(x))

    def _update(self, words: Tensor) -> None:
        if self._reference is not None:
            self._last = self._flips(words)
            if self._count:
                self._total = accumulate(self._total, self._last)
        self._reference = words
        self._count += 1

    def reset(self) -> None:
        self._total, self._count = 0, 0

    @property
    def last(self) -> float:
        return NAN if self._last is None or not self.size else int(self._last) / self.size

    @property
    def value(self) -> float:
        updates = (self._count - 1) * self.size
        return int(self._total) / updates if updates > 0 else 0.0


class C2IRatio(_SignMetric):
    """Correlation to initialisation: 1 - the share of signs that differ from those at the start.

        C2I = 1 - sum |sign(w) - sign(w_0)| / 2 / number of weights

    update(x): x of any shape and real dtype; the first call sets w_0. value: 1 where no sign
    differs, 0 where all do, NaN before an update. reset forgets w_0. Source: AdamBNN.

    Raises ValueError for an x of another size.
    """

    _state = ("size", "_reference", "_changed")

    def __init__(self) -> None:
        self._changed: Tensor | None = None

    def update(self, x: Tensor) -> None:
        self._update(self._checked(x))

    def _update(self, words: Tensor) -> None:
        if self._reference is None:
            self._reference = words
        self._changed = self._flips(words)

    def reset(self) -> None:
        self._reference = self._changed = None

    @property
    def value(self) -> float:
        return NAN if self._changed is None or not self.size else (
            1 - int(self._changed) / self.size)


class DeadWeights(_SignMetric):
    """Share of the weights that neither change nor are pushed, over a window of updates.

    A weight is dead in a window of `window` updates if its sign did not change in it and, at each
    of its updates, |g| <= tolerance * rms(g), with g the gradient of this tensor and rms(g) the
    root mean square of its elements. That does not depend on the scale of the loss; where all of
    g is 0 every weight counts as not pushed, and a NaN counts as a push. tolerance=0 asks for
    gradients of exactly 0, as straight-through masks make them. For normally distributed gradients
    the default lets 0.8 % pass at one update and, by chance, none at a hundred.

    update(x, grad): the weights after an update and the gradient that made it. In the first one
    ever no earlier signs are known and only the gradient counts. Windows follow each other. value:
    the share in the last complete window, NaN before there is one; current: the share in the window
    so far. reset starts a new window and keeps the signs. Source: AdamBNN names dead weights; the
    definition is ours.

    Raises ValueError for a window below 1, a negative tolerance and an x of another size.
    """

    _state = ("size", "_reference", "_still", "_updates", "_dead")

    def __init__(self, window: int = 100, tolerance: float = 1e-2) -> None:
        self.window = integer("DeadWeights", "window", window)
        self.tolerance = number("DeadWeights", "tolerance", tolerance, 0)
        self._still: Tensor | None = None  # packed: not changed and not pushed in this window
        self._updates = 0
        self._dead: Tensor | None = None

    def update(self, x: Tensor, grad: Tensor) -> None:
        if grad.shape != x.shape:
            raise ValueError(f"DeadWeights: weights of shape {tuple(x.shape)}, gradient of shape "
                             f"{tuple(grad.shape)}")
        self._update(self._checked(x), grad)

    def _update(self, words: Tensor, grad: Tensor | None) -> None:
        previous, self._reference = self._reference, words
        if grad is None:
            return
        still = self._quiet(grad)
        if previous is not None:
            still &= ~(words ^ previous.to(words.device))
        if self._still is not None:
            still &= self._still.to(words.device)
        self._still = still
        self._updates += 1
        if self._updates == self.window:
            self._dead = popcount(still)
            self.reset()

    def _quiet(self, grad: Tensor) -> Tensor:
        g = grad.detach()
        g = g if g.dtype == torch.float64 else g.float()
        tiny = torch.finfo(g.dtype).tiny
        bound = self.tolerance * g.square().mean().sqrt()
        return packed_within(g / bound.clamp_min(tiny), 1.0)

    def reset(self) -> None:
        self._still, self._updates = None, 0

    @property
    def value(self) -> float:
        return NAN if self._dead is None or not self.size else int(self._dead) / self.size

    @property
    def current(self) -> float:
        if self._still is None or not self.size:
            return NAN
        return int(popcount(self._still)) / self.size
