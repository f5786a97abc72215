"""Adam against SGD for latent weights: accuracy and dead weights, each at two rates.

  python examples/experiments/adam_sgd.py [--quick]

AdamBNN (Liu et al. 2021) finds Adam better and explains it by weights whose gradients vanish
because activations saturate: they are dead under SGD, and Adam's second moment revives them.
"""

from __future__ import annotations

from typing import Any

from runner import Row, Variant, adam, dots, last, main, sets, stage, table

from bitkernels.train import Method, Recipe, Schedule

EPOCHS = 10
ADAM, SGD = (3e-3, 1e-2), (0.1, 0.3)


def variants(_data: str) -> list[Variant]:
    methods = [(f"Adam {lr:g}", adam(lr)) for lr in ADAM]
    methods += [(f"SGD {lr:g}", Method("sgd", lr, Schedule("linear"), momentum=0.9)) for lr in SGD]
    return [Variant(name, Recipe(name, (stage("train", EPOCHS, method),)))
            for name, method in methods]


def plot(rows: list[Row], axes: Any) -> None:
    values = {"held-out accuracy, %": last("held_out_accuracy"),
              "dead weights, %": last("dead_weights"), "C2I, %": last("c2i_ratio")}
    for line, data in zip(axes, sets(rows), strict=True):
        for axis, (label, value) in zip(line, values.items(), strict=True):
            dots(axis, rows, data, value, label)
    table(rows, values)


if __name__ == "__main__":
    main("adam_sgd", variants, plot, columns=3, describe=__doc__)
