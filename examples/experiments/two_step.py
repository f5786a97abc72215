"""Two steps against one, and weight decay in the first step, in both, or in none.

  python examples/experiments/two_step.py [--quick]

ReActNet and AdamBNN train first with binary activations and real weights, then with both binary
from that result. "one step" trains with both binary for as many updates as the two steps have.

AdamBNN (Liu et al. 2021): decay makes signs flip more often (FF up) and the result depend less on
the initial signs (C2I down); decay in the first step alone has the best of both. Its decay is 5e-6
over 2.5 million updates; the few hundred here need a larger one to show anything. No teacher.
"""

from __future__ import annotations

from typing import Any

from runner import Row, Variant, adam, curves, dots, last, main, mean_of, sets, stage, table

from bitkernels.train import Recipe

EPOCHS = 10
DECAY = 1e-3
STEPS = {"no decay": (0.0, 0.0), "decay in step 1": (DECAY, 0.0), "decay in both": (DECAY, DECAY)}


def variants(_data: str) -> list[Variant]:
    one = Variant("one step", Recipe("one", (stage("step2", 2 * EPOCHS, adam()),)))
    return [one] + [Variant(name, Recipe("two", (
        stage("step1", EPOCHS, adam(weight_decay=first), weights="real"),
        stage("step2", EPOCHS, adam(weight_decay=second), start="step1"))))
        for name, (first, second) in STEPS.items()]


def plot(rows: list[Row], axes: Any) -> None:
    values = {"held-out accuracy, %": last("held_out_accuracy"),
              "FF, % an update": mean_of("flip_ratio", "step2"),
              "C2I, %": last("c2i_ratio")}
    for line, data in zip(axes, sets(rows), strict=True):
        for color, variant in (("C0", "one step"), ("C1", "no decay")):
            curves(line[0], rows, data, variant, "held_out_accuracy", color)
        line[0].set_title(data)
        line[0].set_ylabel("held-out accuracy, %")
        line[0].legend(fontsize=8)
        for axis, (label, value) in zip(line[1:], values.items(), strict=True):
            dots(axis, rows, data, value, label)
    table(rows, {**values, "held-out loss": last("held_out_loss", percent=False)})


if __name__ == "__main__":
    main("two_step", variants, plot, columns=4, describe=__doc__)
