"""examples/experiments: what they run, resume, print and plot; the page shows what was measured."""

from __future__ import annotations

import importlib
import math
import sys

import pytest

from bitkernels_tests import ROOT

pytest.importorskip("sklearn")
plt = pytest.importorskip("matplotlib.pyplot")

NAMES = ("adam_sgd", "two_step", "bop")


@pytest.fixture(scope="module")
def experiments():
    folder = str(ROOT / "examples" / "experiments")
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in ("runner", *NAMES)}
    finally:
        sys.path.remove(folder)
        for name in ("runner", *NAMES):
            sys.modules.pop(name, None)
        plt.close("all")


def row(seed, epoch, accuracy, *, stage="a", variant="one", flips=0.01):
    return {"data": "digits", "variant": variant, "seed": seed, "stage": stage, "epoch": epoch,
            "step": 10 * epoch, "held_out_accuracy": accuracy, "flip_ratio": flips}


def test_table_gives_mean_and_range(experiments, capsys):
    runner = experiments["runner"]
    rows = [row(0, 1, 0.5), row(0, 2, 0.9), row(1, 1, 0.1), row(1, 2, 0.96, flips=0.03)]
    runner.table(rows, {"accuracy": runner.last("held_out_accuracy"),
                        "FF": runner.mean_of("flip_ratio", "a")})
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| digits | one | 2 | 93.0 (90.0 to 96.0) | 1.500 (1.000 to 2.000) |")


def test_curves_put_stages_one_after_the_other(experiments):
    rows = [row(s, e, 0.1 * e + 0.02 * s, stage=stage) for s in (0, 1) for stage in ("a", "b")
            for e in (1, 2)]
    axis = plt.figure().add_subplot()
    experiments["runner"].curves(axis, rows, "digits", "one", "held_out_accuracy", "C0")
    x, y = axis.lines[0].get_data()
    assert list(x) == [10, 20, 30, 40]
    assert [round(v, 6) for v in y] == [11, 21, 11, 21]


@pytest.mark.parametrize("name", NAMES)
def test_variants_differ_and_have_recipes_for_both_sets(experiments, name):
    for data in experiments["runner"].SETS:
        variants = experiments[name].variants(data)
        assert len({v.name for v in variants}) == len(variants) >= 4
        settings = [str(v.recipe.settings()) for v in variants]
        assert len(set(settings)) == len(settings)


def test_a_run_is_written_and_resumed(experiments, tmp_path, monkeypatch):
    runner, two_step = experiments["runner"], experiments["two_step"]
    small = runner.datasets.generated(train=128, held_out=64)
    monkeypatch.setattr(runner, "image_set", lambda name: small)
    path = tmp_path / "two_step.csv"

    def variants(data):
        return two_step.variants(data)[:2]

    runner.run(path, lambda data: variants(data)[:1], ["generated"], [0], True, False)
    runner.run(path, variants, ["generated"], [0], True, True)
    rows = runner.read(path)
    assert [(r["variant"], r["stage"], r["epoch"]) for r in rows] == [
        ("one step", "step2", 1), ("one step", "step2", 2), ("no decay", "step1", 1),
        ("no decay", "step1", 2), ("no decay", "step2", 1), ("no decay", "step2", 2)]
    assert math.isnan(rows[2]["flip_ratio"]) and rows[4]["flip_ratio"] > 0
    written = path.read_text()
    monkeypatch.setattr(runner, "fit", None)  # nothing is left to do
    runner.run(path, variants, ["generated"], [0], True, True)
    assert path.read_text() == written


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_tables_of_the_measurements(experiments, name, capsys):
    """What the committed CSV file gives when it is printed and plotted again."""
    runner = experiments["runner"]
    rows = runner.read(runner.DOCS / f"{name}.csv")
    columns = {"adam_sgd": 3, "two_step": 4, "bop": 3}[name]
    _, axes = plt.subplots(len(runner.sets(rows)), columns, squeeze=False)
    experiments[name].plot(rows, axes)
    printed = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs" / "experiments.md").read_text().splitlines()
    assert len(printed) > 6
    assert [line for line in printed if line not in page] == []
    for data in runner.sets(rows):
        for variant in runner.names(rows, data):
            assert len(runner.runs(rows, data, variant)) >= 3
    assert (runner.DOCS / f"{name}.png").stat().st_size > 10_000
