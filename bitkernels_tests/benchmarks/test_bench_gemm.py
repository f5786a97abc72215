"""benchmarks/bench_gemm.py end to end on small matrices, on a CPU and on a pretended GPU."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bitkernels.backends.cuda import launch
from bitkernels_tests import pretended_gpu

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
OUTPUTS = ("packed", "int32", "fp16")


def bench(monkeypatch, output, *options):
    """(rows of gemm.csv by provider, gemm.json)."""
    monkeypatch.syspath_prepend(str(pretended_gpu.BENCHMARKS))
    import bench_gemm

    bench_gemm.main(["--sizes", "64", "--min-run-time", "0.002", "--device", "cpu", "--output",
                     str(output), *options])
    with (output / "gemm.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    return rows, json.loads((output / "gemm.json").read_text())


def test_on_a_cpu(tmp_path, monkeypatch, capsys):
    rows, record = bench(monkeypatch, tmp_path)
    ours = {f"bitkernels {output}" for output in OUTPUTS}
    assert set(rows) == {*ours, "fp32", "bf16"}
    for name, row in rows.items():
        assert row["match"] == ("True" if name in ours else "")
        assert not row["of floor"] and not row["graph ms"] and not row["kernel"]
        assert bool(row["of peak"]) == (name in ours and record["peak"] is not None)
        assert 0 < float(row["ms p20"]) <= float(row["ms"]) <= float(row["ms p80"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ours)


def test_on_a_gpu_each_backend_has_floor_and_peak(tmp_path, monkeypatch):
    driver = pretended_gpu.install(monkeypatch)
    rows, record = bench(monkeypatch, tmp_path)
    bits = {"packed": 3, "int32": 34, "fp16": 18}
    moved = {f"{backend} {output}": 64 * 64 * bits[output] / 8
             for backend in ("triton", "cuda") for output in OUTPUTS}
    moved["bf16"] = 3 * 2 * 64 * 64
    for name, count in moved.items():
        row, ours = rows[name], name != "bf16"
        seconds = float(row["ms"]) / 1e3
        assert float(row["of floor"]) == pytest.approx(count / pretended_gpu.BANDWIDTH / seconds)
        assert float(row["graph ms"]) > 0
        assert row["match"] == ("True" if ours else "")
        if ours:
            rate = 2 * 64**3 / seconds
            assert float(row["POPS"]) == pytest.approx(rate / 1e15)
            assert float(row["of peak"]) == pytest.approx(rate / record["peak"])
        assert (row["kernel"] == pretended_gpu.KERNEL) == name.startswith("cuda")
    assert set(driver.launched) == {pretended_gpu.KERNEL, "prepare"}


def test_one_backend_alone(tmp_path, monkeypatch):
    pretended_gpu.install(monkeypatch)
    rows, _ = bench(monkeypatch, tmp_path, "--backends", "cuda")
    assert {name.split()[0] for name in rows if " " in name} == {"cuda"}


def test_where_csrc_cuda_cannot_run_a_note_says_why(tmp_path, monkeypatch, capsys):
    pretended_gpu.install(monkeypatch, unusable="NVRTC does not load")
    rows, record = bench(monkeypatch, tmp_path)
    assert not any(name.startswith("cuda") or row["of peak"] for name, row in rows.items())
    assert record["notes"]["of peak"] == "NVRTC does not load"
    assert "cuda packed, 64: the next backend: NVRTC does not load" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", (torch.int32, torch.float16), ids=str)
def test_wrong_results_end_the_run(wrong, tmp_path, monkeypatch):
    """Words and dot products are int32."""
    pretended_gpu.install(monkeypatch)
    right = launch.packed_linear
    monkeypatch.setattr(launch, "packed_linear", lambda *args, **kw: tuple(
        t + 1 if t is not None and t.dtype == wrong else t for t in right(*args, **kw)))
    with pytest.raises(SystemExit, match="wrong results"):
        bench(monkeypatch, tmp_path)
    assert (tmp_path / "gemm.csv").exists()


def test_bad_sizes_are_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench(monkeypatch, tmp_path, "--sizes", "40")
    assert "--sizes must be multiples of 32" in capsys.readouterr().err
