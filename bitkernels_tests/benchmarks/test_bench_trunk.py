"""benchmarks/bench_trunk.py end to end on small images, on a CPU and on a pretended GPU."""

from __future__ import annotations

import csv
import json

import pytest

from bitkernels import reference
from bitkernels.backends.cuda import launch
from bitkernels_tests import pretended_gpu

pytest.importorskip("tabulate")


@pytest.fixture(autouse=True)
def threads(keeps_threads):
    """The script sets their number."""


def bench(monkeypatch, output, *options):
    """(rows of trunk.csv by provider, environment of trunk.json)."""
    monkeypatch.syspath_prepend(str(pretended_gpu.BENCHMARKS))
    import bench_trunk

    bench_trunk.main(["--depth", "1", "--size", "4", "--batch", "1", "--min-run-time", "0.002",
                      "--device", "cpu", "--threads", "1", "--output", str(output), *options])
    with (output / "trunk.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    return rows, json.loads((output / "trunk.json").read_text())["environment"]


def test_on_a_cpu(tmp_path, monkeypatch, capsys):
    rows, record = bench(monkeypatch, tmp_path, "--depth", "2", "--size", "9", "--batch", "2")
    assert set(rows) == {"bitkernels packed", "fp32 channels_last", "fp32 contiguous_format"}
    assert rows["bitkernels packed"]["match"] == "True"
    assert {"device", "torch", "kernel", "date"} <= set(record) and record["depth"] == 2
    assert "8 convolutions, batch 2, 1 threads" in capsys.readouterr().out
    fastest = min(float(row["ms"]) for name, row in rows.items() if name.startswith("fp32"))
    for row in rows.values():
        assert 0 < float(row["ms p20"]) <= float(row["ms"]) <= float(row["ms p80"])
        assert float(row["over fp32"]) == pytest.approx(fastest / float(row["ms"]))
        assert not row["graph ms"] and not row["graph over fp32"]


def test_layers_are_those_of_a_resnet_18(monkeypatch):
    monkeypatch.syspath_prepend(str(pretended_gpu.BENCHMARKS))
    import bench_trunk
    import common

    trunk = bench_trunk.Trunk(4, 56, 1, common.CpuDevice())
    assert [(args[1], kw["out_channels"], args[2][0]) for args, kw in trunk.layers] == [
        (64, 64, 1)] * 4 + [(64, 128, 2)] + [(128, 128, 1)] * 3 + [(128, 256, 2)] + [
        (256, 256, 1)] * 3 + [(256, 512, 2)] + [(512, 512, 1)] * 3
    outputs = trunk()
    assert [tuple(t.shape) for t in outputs[::4]] == [
        (1, 56, 56, 2), (1, 28, 28, 4), (1, 14, 14, 8), (1, 7, 7, 16)]
    assert trunk.operations == 2 * (13 * 9 * 64 * 64 * 56 * 56 + 3 * 9 * 64 * 64 * 56 * 56 // 2)
    # No layer's signs are all alike, so a wrong word is seen in the layers after it.
    assert all(abs(reference.unpack(t, 32 * t.shape[-1]).mean()) < 0.3 for t in outputs)


def test_on_a_gpu_each_backend_stands_and_has_a_graph(tmp_path, monkeypatch):
    driver = pretended_gpu.install(monkeypatch)
    rows, record = bench(monkeypatch, tmp_path)
    assert set(rows) == {"triton packed", "cuda packed", "bf16 channels_last",
                         "bf16 contiguous_format"}
    fastest = min(float(row["graph ms"]) for name, row in rows.items() if name.startswith("bf16"))
    for name in ("triton packed", "cuda packed"):
        row = rows[name]
        assert row["match"] == "True"
        assert (row["kernel"] == pretended_gpu.KERNEL) == name.startswith("cuda")
        assert float(row["of peak"]) == pytest.approx(float(row["POPS"]) * 1e15 / record["peak"])
        assert float(row["graph over bf16"]) == pytest.approx(fastest / float(row["graph ms"]))
    assert set(driver.launched) == {pretended_gpu.KERNEL, "prepare"}


def test_a_wrong_layer_ends_the_run(tmp_path, monkeypatch):
    pretended_gpu.install(monkeypatch)
    right = launch.packed_conv2d

    def wrong(kernel, words, *args, **kw):
        real, packed = right(kernel, words, *args, **kw)
        return real, packed ^ 1 if args[1] == 128 else packed

    monkeypatch.setattr(launch, "packed_conv2d", wrong)
    with pytest.raises(SystemExit, match="do not match"):
        bench(monkeypatch, tmp_path)


def test_where_csrc_cuda_does_not_take_a_layer_it_is_left_out(tmp_path, monkeypatch, capsys):
    pretended_gpu.install(monkeypatch)
    outside = launch.outside
    monkeypatch.setattr(launch, "outside", lambda op, args, kw: (
        "512 filters" if args[1].shape[0] * 16 == 512 else outside(op, args, kw)))
    rows, _ = bench(monkeypatch, tmp_path)
    assert "triton packed" in rows and "cuda packed" not in rows
    assert ("cuda packed, batch 1 n/a: the next backend: these kernels do not take 512 filters"
            in capsys.readouterr().out)


@pytest.mark.parametrize("option", ("--depth", "--size"))
def test_bad_options_are_named(option, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bench(monkeypatch, tmp_path, option, "0")
    assert "must be 1 or more" in capsys.readouterr().err
