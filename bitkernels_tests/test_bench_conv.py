"""benchmarks/bench_conv.py end to end on one small layer: files written, outputs correct."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitkernels

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench_conv.py"
LAYERS = ("3x3/2:40@9",)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench_conv")
    command = [sys.executable, str(BENCH), "--quick", "--min-run-time", "0.01", "--device", "cpu",
               "--layers", *LAYERS, "--batch", "1", "2", "--threads", "1", "--output", str(output)]
    env = os.environ | {"PYTHONPATH": str(Path(bitkernels.__file__).parents[1])}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return output, run.stdout


def test_table_names_layers_and_means(results):
    _, printed = results
    assert all(layer in printed for layer in LAYERS)
    assert "geometric mean over fp32" in printed


def test_csv_has_every_provider_and_all_match(results):
    output, _ = results
    with (output / "conv.csv").open() as file:
        rows = list(csv.DictReader(file))
    providers = {row["kernel_provider"] for row in rows}
    assert {"bitkernels real", "bitkernels packed", "fp32", "bf16"} <= providers
    assert len(rows) == 2 * len(providers)
    ours = [row["match"] for row in rows if row["kernel_provider"].startswith("bitkernels")]
    assert ours == ["True"] * 4
    assert all(0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)


def test_json_and_chart(results):
    output, _ = results
    record = json.loads((output / "conv.json").read_text())
    assert {"device", "torch", "bitkernels", "kernel", "date"} <= set(record["environment"])
    assert len(record["rows"]) == 2 and all(row["match"] for row in record["rows"])
    assert (output / "conv.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_columns(tmp_path, monkeypatch, capsys):
    """What a GPU adds, on a processor that claims to be one: half types, warm times, floors."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import bench_conv
    import common

    class Pretended(common.CpuDevice):
        baseline, batches, int8 = "bf16", (1, 2), (torch.qint8, 0)
        reals, rivals = common.GpuDevice.reals, common.GpuDevice.rivals
        measure_warm = common.CpuDevice.measure

        def set_threads(self, threads):
            pass

        def copy_bandwidth(self):
            return 1e9

        def popcount_rate(self):
            return None

    monkeypatch.setattr(common, "pick_device", lambda name: Pretended())
    bench_conv.main(["--quick", "--min-run-time", "0.01", "--layers", "3x3/2:40@9", "--threads",
                     "1", "--output", str(tmp_path)])
    assert "of floor" in capsys.readouterr().out
    with (tmp_path / "conv.csv").open() as file:
        rows = {(r["batch"], r["kernel_provider"]): r for r in csv.DictReader(file)}
    assert {batch for batch, _ in rows} == {"1", "2"}
    pixels, weights = 9 * 9 + 5 * 5, 40 * 9
    filter_words = 48 * 9 * 2  # of 3 tiles of 16 channels
    bytes_moved = {"bf16": 2 * 40 * (2 * pixels + weights),
                   "bitkernels fp16": 2 * 40 * 2 * pixels + 4 * filter_words,
                   "bitkernels packed": 4 * (2 * 2 * pixels + filter_words)}
    for name, count in bytes_moved.items():
        row = rows["2", name]
        assert float(row["floor"]) == pytest.approx(count / 1e6)
        assert float(row["of_floor"]) == pytest.approx(count / 1e6 / float(row["p50"]), rel=1e-3)
        assert float(row["graph_p50"]) > 0
    ours = [row["match"] for row in rows.values() if "bitkernels" in row["kernel_provider"]]
    assert ours == ["True"] * 6
