"""benchmarks/bench_block.py end to end on one tiny block: files written, outputs correct."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bitkernels

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench_block.py"


def bench(*options):
    command = [sys.executable, str(BENCH), "--quick", "--min-run-time", "0.01", "--device", "cpu",
               *options]
    env = os.environ | {"PYTHONPATH": str(Path(bitkernels.__file__).parents[1])}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench_block")
    run = bench("--blocks", "40@7", "--batch", "2", "--threads", "1", "--output", str(output))
    assert run.returncode == 0, run.stderr
    return output, run.stdout


def test_table_names_the_block_and_both_modes(results):
    _, printed = results
    assert "40@7" in printed and "inference" in printed and "training" in printed
    assert "x over eager" in printed


def test_csv_has_both_modes_and_all_match(results):
    output, _ = results
    with (output / "block.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["mode"], row["kernel_provider"]) for row in rows} == {
        (mode, name) for mode in ("inference", "training") for name in ("eager", "bitkernels")}
    assert [r["match"] for r in rows if r["kernel_provider"] == "bitkernels"] == ["True"] * 2
    assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)


def test_training_keeps_little_more_than_a_quarter_of_the_memory(results):
    """One real tensor a block and a bit an element, where the emulation keeps four tensors."""
    output, _ = results
    row = json.loads((output / "block.json").read_text())["rows"][1]
    real, weight = (4 * numbers * row["depth"] for numbers in (2 * 40 * 7 * 7, 40 * 40 * 3 * 3))
    assert row["mode"] == "training"
    assert 4 * real + weight <= row["saved"]["eager"] <= 4.1 * real + weight
    assert real <= row["saved"]["bitkernels"] <= 1.3 * real  # with statistics of 40 channels


def test_json_and_chart(results):
    output, _ = results
    record = json.loads((output / "block.json").read_text())
    assert {"device", "torch", "bitkernels", "kernel", "date"} <= set(record["environment"])
    assert len(record["rows"]) == 2 and all(row["match"] for row in record["rows"])
    assert (output / "block.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options, message", [
    (("--blocks", "3x3:64@56"), "not channels@size"), (("--depth", "0"), "--depth must be 1")])
def test_bad_options_are_named(options, message):
    run = bench(*options)
    assert run.returncode == 2 and message in run.stderr
