"""Probe of part train: the first, real convolution of a network, as it is and on squares of pixels.

7x7 taps of stride 2 on 3 channels are 4x4 taps of stride 1 on the 12 channels of 2x2 pixels ("space
to depth"). The sums are the same; the channels, with four of zeros 16, fill what tensor cores take
at once. Times are of the rearrangement, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gpu_time
import torch
import torch.nn.functional as F
from record import message
from torch import Tensor

DEVICE, DTYPE = "cuda", torch.bfloat16
BATCH, SIZE, CHANNELS = 128, 224, 64


def rows(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def as_is(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, stride=2, padding=3)


def on_squares(zeros: int, x: Tensor, weight: Tensor) -> Tensor:
    """An image of even sides; `zeros`: channels added to the 12."""
    x = F.pixel_unshuffle(F.pad(x, (4, 2, 4, 2)), 2)  # taps -4 to 3, of which -4 are zeros
    weight = F.pixel_unshuffle(F.pad(weight, (1, 0, 1, 0)), 2)
    return F.conv2d(rows(F.pad(x, (0, 0) * 2 + (0, zeros))),
                    rows(F.pad(weight, (0, 0) * 2 + (0, zeros))))


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "7x7": as_is, "4x4 of 12": partial(on_squares, 0), "4x4 of 16": partial(on_squares, 4)}


def probe() -> dict:
    """Microseconds in a graph of the forward, and of it with the weight's gradient, by form;
    whether output and gradient are those of the convolution as it is, to bfloat16's rounding."""
    torch.manual_seed(0)
    x = rows(torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE, dtype=DTYPE))
    weight = rows(torch.randn(CHANNELS, 3, 7, 7, device=DEVICE, dtype=DTYPE)).requires_grad_()
    grad = rows(torch.randn(BATCH, CHANNELS, SIZE // 2, SIZE // 2, device=DEVICE, dtype=DTYPE))

    def forward(form: Callable, _: int = 0) -> Tensor:
        with torch.no_grad():
            return form(x, weight)

    def step(form: Callable, _: int = 0) -> tuple[Tensor, Tensor]:
        out = form(x, weight)
        return out.detach(), torch.autograd.grad(out, weight, grad)[0]

    right = [t.float() for t in step(as_is)]
    distance = {name: max(float((t.float() - r).norm() / r.norm()) for t, r in zip(
        step(form), right, strict=True)) for name, form in FORMS.items()}
    ms, errors = gpu_time.in_turns({
        f"{name} {what}": (partial(call, form), 4) for name, form in FORMS.items()
        for what, call in (("forward", forward), ("step", step))})
    return {"yes": max(distance.values()) < 1e-2, "distance": distance,
            "us": {name: round(1e3 * t, 1) for name, t in ms.items()},
            "errors": {name: message(error) for name, error in errors.items()}}
