"""benchmarks/bench_conv.py end to end on one small layer: files written, outputs correct."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from bitkernels.backends.cuda import launch
from bitkernels_tests import pretended_gpu
from bitkernels_tests.benchmarks import program

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

LAYERS = ("3x3/2:40@9",)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench_conv")
    run = program("bench_conv.py", "--quick", "--device", "cpu", "--layers", *LAYERS, "--batch",
                  "1", "2", "--threads", "1", "--output", str(output))
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


def gpu_run(tmp_path):
    """What bench_conv writes of a small layer on the pretended GPU."""
    import bench_conv

    bench_conv.main(["--quick", "--min-run-time", "0.002", "--layers", "3x3/2:40@9", "--threads",
                     "1", "--output", str(tmp_path)])
    with (tmp_path / "conv.csv").open() as file:
        rows = {(r["batch"], r["kernel_provider"]): r for r in csv.DictReader(file)}
    return rows, json.loads((tmp_path / "conv.json").read_text())


def test_gpu_columns(tmp_path, monkeypatch, capsys):
    """What a GPU adds: half types, both backends, warm times, floors, parts of the peak."""
    driver = pretended_gpu.install(monkeypatch)
    rows, record = gpu_run(tmp_path)
    printed = capsys.readouterr().out
    assert "of floor" in printed and "of peak" in printed and "triton" in printed
    assert {batch for batch, _ in rows} == {"1", "2"}
    pixels, weights = 9 * 9 + 5 * 5, 40 * 9
    filter_words = 48 * 9 * 2  # of 3 tiles of 16 channels
    bytes_moved = {"bf16": 2 * 40 * (2 * pixels + weights)}
    for backend in ("triton", "cuda"):
        bytes_moved |= {f"{backend} {real}": 2 * 40 * 2 * pixels + 4 * filter_words
                        for real in ("fp16", "bf16")}
        bytes_moved[f"{backend} packed"] = 4 * (2 * 2 * pixels + filter_words)
    peak, operations = record["environment"]["peak"], 2 * 2 * 25 * 40 * 40 * 9
    for name, count in bytes_moved.items():
        row, ours = rows["2", name], name != "bf16"
        time = float(row["p50"])
        assert float(row["floor"]) == pytest.approx(count / 1e6)
        assert float(row["of_floor"]) == pytest.approx(count / 1e6 / time, rel=1e-3)
        assert float(row["graph_p50"]) > 0
        assert row["match"] == ("True" if ours else "")
        assert bool(row["of_peak"]) == ours
        if ours:
            assert float(row["of_peak"]) == pytest.approx(1e3 * operations / time / peak, rel=1e-3)
        assert (row["variant"] == pretended_gpu.KERNEL) == name.startswith("cuda")
    assert set(driver.launched) == {pretended_gpu.KERNEL, "prepare"}


def test_a_wrong_kernel_of_either_backend_is_no_match(tmp_path, monkeypatch):
    pretended_gpu.install(monkeypatch)
    right = launch.packed_conv2d
    monkeypatch.setattr(launch, "packed_conv2d", lambda *args, **kw: tuple(
        None if t is None else t ^ 1 if t.dtype == torch.int32 else t
        for t in right(*args, **kw)))
    with pytest.raises(SystemExit, match="do not match"):
        gpu_run(tmp_path)


def test_without_csrc_cuda_a_note_says_why(tmp_path, monkeypatch, capsys):
    pretended_gpu.install(monkeypatch, unusable="NVRTC does not load")
    rows, record = gpu_run(tmp_path)
    providers = {name for _, name in rows}
    assert "triton packed" in providers and "cuda packed" not in providers
    assert all(not row["of_peak"] for row in rows.values())
    notes = record["environment"]["not_available"]
    assert notes["of peak"] == "NVRTC does not load"
    assert [why for name, why in notes.items() if name.startswith("cuda")] == [
        "the next backend: NVRTC does not load"]
    printed = capsys.readouterr().out
    assert "cuda fp16, 3x3/2:40@9 batch 1 n/a: the next backend: NVRTC" in printed
    assert "n/a" in printed.partition("of peak")[2]


class Clocked:
    """A device whose calls take the seconds that they return, and that counts them."""

    def __init__(self):
        self.calls = {}

    def once(self, call):
        taken = call()
        self.calls[taken] = self.calls.get(taken, 0) + 1
        return taken

    def measure(self, call, seconds):
        return [self.once(call) for _ in range(int(seconds / call()))]


def test_slow_calls_are_timed_once(monkeypatch):
    """Of a rival, slower than the baseline; of anything, longer than its time."""
    monkeypatch.syspath_prepend(str(pretended_gpu.BENCHMARKS))
    import common

    device = Clocked()
    taken = {"fp32/a": 0.02, "fp32/b": 0.03, "bf16": 0.5, "ours": 0.021, "late": 2.0,
             "quick": 0.001}
    times = common.measure_in_turns(
        device, {name: lambda t=t: t for name, t in taken.items()}, 1.0,
        baseline=("fp32/a", "fp32/b"), rivals=("fp32/a", "fp32/b", "bf16", "quick"))
    assert {name: t.p50 for name, t in times.items()} == taken
    count = {name: device.calls[t] for name, t in taken.items()}
    assert count["late"] == 1
    assert count["bf16"] == count["fp32/b"] == 2  # the first to warm up
    assert min(count["fp32/a"], count["ours"]) > 20 and count["quick"] > 500


@pytest.mark.parametrize("slowness, measured", [(1, 6), (5, 4), (100, 1)])
def test_what_a_budget_leaves_out_is_the_last_and_is_said(slowness, measured, monkeypatch):
    monkeypatch.syspath_prepend(str(pretended_gpu.BENCHMARKS))
    import bench_conv

    clock = [50.0]

    def measure(case, threads, seconds, limit, *rest):
        clock[0] += max(slowness * limit, 4.0)
        return SimpleNamespace(layer=case.layer.name, batch=case.batch, threads=threads)

    monkeypatch.setattr(bench_conv, "measure", measure)
    monkeypatch.setattr(bench_conv, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    layers = [bench_conv.Layer.parse(name) for name in ("3x3:8@3", "1x1:8@3", "1x1:8@2")]
    notes = {}
    rows, _, _ = bench_conv.run(layers, (1, 2), (1,), bench_conv.common.CpuDevice(), 0.4, 60, notes)
    named = [(row.layer, row.batch) for row in rows]
    assert named == [
        (layer.name, batch) for layer in layers for batch in (1, 2)
        if (batch - 1) * len(layers) + layers.index(layer) < measured]
    if measured == 6:
        assert clock[0] < 50 + 60 and not notes
    else:
        assert list(notes) == [f"{6 - measured} of 6 rows"]


def test_a_table_without_time_has_one_row_and_is_not_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(pretended_gpu.BENCHMARKS))
    import bench_conv

    monkeypatch.setattr(bench_conv.common, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_conv, "LAYERS", ("1x1:8@3", "3x3:8@3"))
    threads = torch.get_num_threads()
    rows = bench_conv.main(["--device", "cpu", "--budget", "0"])
    torch.set_num_threads(threads)
    assert {(row.layer, row.batch) for row in rows} == {("1x1:8@3", 1)} and rows[0].match
    assert "rows n/a: 0 s were over; --budget" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
