"""benchmarks/bench_grad.py end to end on a small layer: files written, outputs correct."""

import csv
import functools
import json

import pytest

import bitkernels
from bitkernels_tests.benchmarks import program

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
if bitkernels.backends.cpu.active() is None:
    pytest.skip("no C++ engine", allow_module_level=True)

bench = functools.partial(program, "bench_grad.py")


def test_table_csv_and_json(tmp_path):
    result = bench("--layers", "3x3:64-128@6", "1x1:16@5", "--batch", "2", "--threads", "1",
                   "--precision", "fp32", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with (tmp_path / "grad.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["layer"], r["kernel_name"], r["kernel_provider"], r["used"], r["match"])
            for r in rows] == [
        (layer, f"conv2d_{gradient}_grad", provider, used, "True")
        for layer, used in (("3x3:64-128@6", "tables"), ("1x1:16@5", "library"))
        for gradient in ("input", "weight") for provider in ("tables", "library")]
    record = json.loads((tmp_path / "grad.json").read_text())
    assert {"device", "torch", "kernel", "date"} <= set(record["environment"])
    assert all(row["layer"] in result.stdout for row in record["rows"])


def test_bfloat16():
    result = bench("--layers", "3x3:512-64@4", "--precision", "bf16", "--threads", "1")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("3x3:512-64")]
    assert [(line[1], line[2], line[-2]) for line in lines] == [
        ("input", "bf16", "library"), ("weight", "bf16", "tables")]


def test_a_layer_that_is_none():
    result = bench("--layers", "3x1:64@6")
    assert result.returncode == 2 and "'3x1:64@6' is not kernel:channels@size" in result.stderr
