"""Bop over gamma and threshold: accuracy and how many signs flip.

  python examples/experiments/bop.py [--quick]

The paper (Helwegen et al. 2019, section 5.1) varies gamma at threshold 1e-6 and the threshold at
gamma 1e-3: a high gamma or a low threshold learns fast and stays noisy, the opposite is slow.
Here gamma varies at threshold 1e-7. It stays constant, as there, and Adam's rate for the rest falls
to a hundredth. BinaryNet on digits; on the generated images the ReActNet of the other experiments
with its binary weights by Bop.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from runner import (
    Row,
    Variant,
    curves,
    dots,
    last,
    main,
    reactnet,
    sets,
    stage,
    table,
)

from bitkernels import models
from bitkernels.train import Method, Recipe, Schedule

EPOCHS = 12
GAMMAS, THRESHOLDS = (1e-2, 1e-3, 1e-4), (0.0, 1e-7, 1e-6, 1e-5)
GAMMA, THRESHOLD = 1e-3, 1e-7  # where the other one varies


def binarynet() -> models.BinaryNet:
    return models.BinaryNet(10, 1, 8, width=32, first_padding=1, norm_momentum=0.1)


def name(gamma: float, threshold: float) -> str:
    return f"gamma {gamma:g}, threshold {threshold:g}"


def variants(data: str) -> list[Variant]:
    rest = Method("adam", 1e-2, Schedule("linear", final=1e-2))
    return [Variant(name(gamma, threshold), Recipe("bop", (
        stage("bop", EPOCHS, Method("bop", gamma, threshold=threshold), rest=rest,
              signs_at_start=True),)), binarynet if data == "digits" else partial(reactnet, data))
        for gamma in GAMMAS for threshold in THRESHOLDS
        if gamma == GAMMA or threshold == THRESHOLD]


def plot(rows: list[Row], axes: Any) -> None:
    for line, data in zip(axes, sets(rows), strict=True):
        for i, gamma in enumerate(GAMMAS):
            curves(line[0], rows, data, name(gamma, THRESHOLD), "held_out_accuracy", f"C{i}")
        for i, threshold in enumerate(THRESHOLDS):
            curves(line[1], rows, data, name(GAMMA, threshold), "held_out_accuracy", f"C{i}")
        for axis in line[:2]:
            axis.set_title(data)
            axis.set_ylabel("held-out accuracy, %")
            axis.legend(fontsize=7)
        dots(line[2], rows, data, last("flip_ratio"), "flips an update, %")
        line[2].set_yscale("log")
    table(rows, {"held-out accuracy, %": last("held_out_accuracy"),
                 "flips of the last epoch, % an update": last("flip_ratio"),
                 "C2I, %": last("c2i_ratio")})


if __name__ == "__main__":
    main("bop", variants, plot, columns=3, describe=__doc__)
