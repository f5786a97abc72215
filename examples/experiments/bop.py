"""Bop over gamma and threshold: accuracy and how many signs flip.

  python examples/experiments/bop.py [--quick]

The paper (Helwegen et al. 2019, section 5.1) varies gamma at threshold 1e-6 and the threshold at
gamma 1e-3: a high gamma or a low threshold learns fast and stays noisy, the opposite is slow.
Here gamma stays constant, as there, and Adam's rate for the rest falls to a hundredth. BinaryNet on
digits; on the generated images, and on a cross through the grid only, the ReActNet of the other
experiments with its binary weights by Bop.
"""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from common import Row, Variant, last, main, names, reactnet, runs, sets, stage, table

from bitkernels import models
from bitkernels.train import Method, Recipe, Schedule

EPOCHS = 12
GAMMAS, THRESHOLDS = (1e-2, 1e-3, 1e-4), (0.0, 1e-7, 1e-6, 1e-5)


def binarynet() -> models.BinaryNet:
    return models.BinaryNet(10, 1, 8, width=32, first_padding=1, norm_momentum=0.1)


def variants(data: str) -> list[Variant]:
    rest = Method("adam", 1e-2, Schedule("linear", final=1e-2))
    return [Variant(f"gamma {gamma:g}, threshold {threshold:g}", Recipe("bop", (
        stage("bop", EPOCHS, Method("bop", gamma, threshold=threshold), rest=rest,
              signs_at_start=True),)), binarynet if data == "digits" else partial(reactnet, data))
        for gamma in GAMMAS for threshold in THRESHOLDS
        if data == "digits" or gamma == GAMMAS[1] or threshold == THRESHOLDS[1]]


def plot(rows: list[Row], axes: Any) -> None:
    for line, data in zip(axes, sets(rows), strict=True):
        cells = {tuple(float(part.split()[1]) for part in name.split(", ")): runs(rows, data, name)
                 for name in names(rows, data)}
        for axis, key, label in ((line[0], "held_out_accuracy", "held-out accuracy, %"),
                                 (line[1], "flip_ratio", "flips of the last epoch, log10")):
            heat(axis, {place: [100 * run[-1][key] for run in found]
                        for place, found in cells.items()}, key == "flip_ratio")
            axis.set_title(f"{data}: {label}", fontsize=9)
    table(rows, {"held-out accuracy, %": last("held_out_accuracy"),
                 "flips of the last epoch, % an update": last("flip_ratio"),
                 "C2I, %": last("c2i_ratio")})


def heat(axis: Any, cells: dict[tuple[float, ...], list[float]], logarithm: bool) -> None:
    """A map of the means; each cell has the spread written in it."""
    gammas = sorted({gamma for gamma, _ in cells})
    thresholds = sorted({threshold for _, threshold in cells})
    means = [[statistics.fmean(cells[gamma, t]) if (gamma, t) in cells else math.nan
              for t in thresholds] for gamma in gammas]
    if logarithm:
        means = [[math.log10(max(m / 100, 1e-6)) for m in line] for line in means]
    axis.imshow(means, aspect="auto", origin="lower", cmap="viridis")
    for y, gamma in enumerate(gammas):
        for x, threshold in enumerate(thresholds):
            values = cells.get((gamma, threshold))
            if values is None:
                continue
            text = f"{means[y][x]:.1f}" + (
                "" if logarithm else f"\n{min(values):.0f}-{max(values):.0f}")
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white",
                      bbox=dict(facecolor="black", alpha=0.35, lw=0, pad=1))
    axis.set_xticks(range(len(thresholds)), [f"{t:g}" for t in thresholds])
    axis.set_yticks(range(len(gammas)), [f"{g:g}" for g in gammas])
    axis.set_xlabel("threshold")
    axis.set_ylabel("gamma")


if __name__ == "__main__":
    main("bop", variants, plot, columns=2, describe=__doc__)
