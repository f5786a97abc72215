"""What the experiments share: image sets, networks, running variants over seeds, CSV, tables.

An experiment is a list of named recipes for each image set. `main` trains each of them once per
seed, writes one line an epoch to NAME.csv, and hands the lines to the experiment's plot.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from bitkernels import models
from bitkernels.train import Loss, Method, Options, Recipe, Schedule, Stage, datasets, fit
from bitkernels.train.data import Data

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[2] / "docs" / "experiments"
SETS = ("digits", "generated")
COLUMNS = ("data", "variant", "seed", "stage", "epoch", "step", "lr", "train_loss",
           "train_accuracy", "held_out_loss", "held_out_accuracy", "flip_ratio", "c2i_ratio",
           "dead_weights")
Row = dict[str, Any]
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One way to train; `build` overrides the network of the image set."""

    name: str
    recipe: Recipe
    build: Build | None = None


def reactnet(data: str) -> nn.Module:
    """Two blocks, with 52,224 binary weights for digits and 14,080 for the generated images."""
    if data == "digits":
        return models.ReActNet(10, 1, channels=(32, 64, 64))
    return models.ReActNet(10, 3, channels=(16, 32, 64), strides=(2, 1), stem_stride=2)


def image_set(name: str) -> Data:
    if name == "digits":
        return datasets.digits()
    return datasets.generated(train=1500, held_out=500, noise=0.5)


def stage(name: str, epochs: int, method: Method, **fields: Any) -> Stage:
    """Batch 64, labels smoothed by 0.1, images shifted."""
    return Stage(name, epochs, 64, method, augmentation="shift", loss=Loss(label_smoothing=0.1),
                 **fields)


def adam(lr: float = 3e-3, **fields: Any) -> Method:
    """Adam with a rate that falls linearly to 0."""
    return Method("adam", lr, Schedule("linear"), **fields)


def main(name: str, variants: Callable[[str], list[Variant]],
         plot: Callable[[list[Row], Any], None], *, columns: int, seeds: int = 3,
         describe: str = "") -> None:
    """Run an experiment from the command line; its plot has a line of panels for each set."""
    parser = argparse.ArgumentParser(
        description=describe, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="one seed of two epochs a stage, into a new temporary folder")
    parser.add_argument("--out", type=Path, help=f"default: {DOCS.relative_to(DOCS.parents[1])}")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--data", choices=SETS, nargs="+", default=list(SETS))
    parser.add_argument("--resume", action="store_true",
                        help="keep the runs that the CSV file has and do the rest")
    parser.add_argument("--plot-only", action="store_true", help="plot the CSV file")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or (Path(tempfile.mkdtemp(prefix="experiments-")) if args.quick else DOCS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.csv"
    if not args.plot_only:
        run(path, variants, args.data, range(1 if args.quick else args.seeds), args.quick,
            args.resume)
    rows = read(path)
    lines = len(sets(rows))
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.0 * lines),
                                squeeze=False, layout="constrained")
    plot(rows, axes)
    figure.savefig(out / f"{name}.png", dpi=90)
    print(f"{path}\n{out / name}.png")


def run(path: Path, variants: Callable[[str], list[Variant]], data_sets: Sequence[str],
        seeds: Sequence[int], quick: bool, resume: bool) -> None:
    """Train every variant on every set, seed by seed, and append each run's epochs to the file."""
    done = {(row["data"], row["variant"], row["seed"]) for row in read(path)} if (
        resume and path.exists()) else set()
    with open(path, "a" if done else "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if not done:
            writer.writeheader()
        for seed in seeds:
            for data in data_sets:
                for variant in variants(data):
                    if (data, variant.name, seed) in done:
                        print(f"{data}, {variant.name}, seed {seed}: kept")
                        continue
                    recipe = variant.recipe.scaled(epochs=2) if quick else variant.recipe
                    build = variant.build or (lambda data=data: reactnet(data))
                    result = fit(build, recipe, image_set(data), options=Options(), seed=seed)
                    writer.writerows(_rounded({"data": data, "variant": variant.name, "seed": seed,
                                               **row}) for row in result.rows)
                    file.flush()
                    print(f"{data}, {variant.name}, seed {seed}: {result.accuracy:.2%}",
                          flush=True)


def _rounded(row: Row) -> Row:
    return {key: f"{value:.6g}" if isinstance(value, float) else value
            for key, value in row.items()}


def read(path: Path) -> list[Row]:
    """The lines of a CSV file; what is no text there becomes a number, nothing becomes NaN."""
    with open(path, newline="") as file:
        rows: list[Row] = []
        for line in csv.DictReader(file):
            row: Row = {key: line[key] for key in ("data", "variant", "stage")}
            row |= {key: int(line[key]) for key in ("seed", "epoch", "step")}
            row |= {key: float(line[key] or "nan") for key in COLUMNS if key not in row}
            rows.append(row)
        return rows


def runs(rows: list[Row], data: str, variant: str) -> list[list[Row]]:
    """The lines of each seed, in the order of their epochs."""
    chosen = [row for row in rows if row["data"] == data and row["variant"] == variant]
    return [[row for row in chosen if row["seed"] == seed]
            for seed in sorted({row["seed"] for row in chosen})]


def sets(rows: list[Row]) -> list[str]:
    """The image sets, in the order of the file."""
    return list(dict.fromkeys(row["data"] for row in rows))


def names(rows: list[Row], data: str) -> list[str]:
    """The variants of a set, in the order of the file."""
    return list(dict.fromkeys(row["variant"] for row in rows if row["data"] == data))


def last(key: str, percent: bool = True) -> Callable[[list[Row]], float]:
    """The value of a run's last line."""
    return lambda run: run[-1][key] * (100 if percent else 1)


def mean_of(key: str, stage_name: str) -> Callable[[list[Row]], float]:
    """The mean over a stage's epochs, in percent."""
    return lambda run: 100 * statistics.fmean(row[key] for row in run
                                              if row["stage"] == stage_name)


def table(rows: list[Row], values: dict[str, Callable[[list[Row]], float]]) -> None:
    """Print a Markdown table: the mean of each value over the seeds, and smallest to largest."""
    print("| data | variant | seeds | " + " | ".join(values) + " |")
    print("|---|---|---|" + "---|" * len(values))
    for data in sets(rows):
        for variant in names(rows, data):
            found = runs(rows, data, variant)
            cells = [spread([value(run) for run in found]) for value in values.values()]
            print(f"| {data} | {variant} | {len(found)} | " + " | ".join(cells) + " |")


def spread(values: list[float]) -> str:
    digits = 1 if max(abs(v) for v in values) >= 10 else 3
    return (f"{statistics.fmean(values):.{digits}f} "
            f"({min(values):.{digits}f} to {max(values):.{digits}f})")


def dots(axis: Any, rows: list[Row], data: str, value: Callable[[list[Row]], float],
         label: str) -> None:
    """One dot a seed and a bar at the mean, variants from left to right."""
    variants = names(rows, data)
    for x, variant in enumerate(variants):
        values = [value(run) for run in runs(rows, data, variant)]
        axis.plot([x] * len(values), values, "o", color="C0", alpha=0.6)
        axis.plot([x - 0.25, x + 0.25], [statistics.fmean(values)] * 2, color="C1", lw=2)
    axis.set_xticks(range(len(variants)), variants, rotation=25, ha="right", fontsize=8)
    axis.set_ylabel(label)
    axis.set_title(data)
    axis.grid(axis="y", alpha=0.3)


def curves(axis: Any, rows: list[Row], data: str, variant: str, key: str, color: str) -> None:
    """The mean over the seeds at each update of all stages, and a band from least to most."""
    found = runs(rows, data, variant)
    steps: list[int] = []
    offset = 0
    for before, row in zip([None, *found[0]], found[0], strict=False):
        if before is not None and before["stage"] != row["stage"]:
            offset += before["step"]
        steps.append(offset + row["step"])
    values = [[100 * run[i][key] for run in found] for i in range(len(steps))]
    axis.plot(steps, [statistics.fmean(v) for v in values], color=color, label=variant)
    axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color,
                      alpha=0.2, lw=0)
    axis.set_xlabel("update")
    axis.grid(alpha=0.3)
