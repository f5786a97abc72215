"""benchmarks/bench_block.py end to end on one tiny block: files written, outputs correct."""

import csv
import functools
import json

import pytest

from bitkernels.backends.cuda import launch
from bitkernels_tests import pretended_gpu
from bitkernels_tests.benchmarks import program

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

bench = functools.partial(program, "bench_block.py", "--quick", "--device", "cpu")


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
    """One real tensor a block and a bit an element, where the emulation keeps four tensors; a bit
    of each weight, where it keeps a number."""
    output, _ = results
    row = json.loads((output / "block.json").read_text())["rows"][1]
    real, weight = (4 * numbers * row["depth"] for numbers in (2 * 40 * 7 * 7, 40 * 40 * 3 * 3))
    assert row["mode"] == "training"
    assert 4 * real + weight <= row["saved"]["eager"] <= 4.1 * real + weight
    # With statistics of 40 channels, whose bits are two words.
    assert real <= row["saved"]["bitkernels"] <= 1.3 * real + weight / 20


def test_json_and_chart(results):
    output, _ = results
    record = json.loads((output / "block.json").read_text())
    assert {"device", "torch", "bitkernels", "kernel", "date"} <= set(record["environment"])
    assert len(record["rows"]) == 2 and all(row["match"] for row in record["rows"])
    assert (output / "block.png").read_bytes().startswith(b"\x89PNG")


def gpu_run(tmp_path):
    """What bench_block writes of a small chain on the pretended GPU."""
    import bench_block

    bench_block.main(["--blocks", "40@5", "--batch", "1", "--threads", "1", "--depth", "2",
                      "--min-run-time", "0.002", "--output", str(tmp_path)])
    with (tmp_path / "block.csv").open() as file:
        return {(r["mode"], r["kernel_provider"]): r for r in csv.DictReader(file)}


def test_on_a_gpu_inference_stands_once_for_each_backend(tmp_path, monkeypatch, capsys):
    driver = pretended_gpu.install(monkeypatch)
    rows = gpu_run(tmp_path)
    assert set(rows) == {("inference", "eager"), ("inference", "triton"), ("inference", "cuda"),
                         ("training", "eager"), ("training", "triton")}
    eager, ours = rows["inference", "eager"], rows["inference", "cuda"]
    assert ours["match"] == "True" and ours["variant"] == pretended_gpu.KERNEL
    assert float(ours["graph_p50"]) > 0
    assert float(eager["cuda_speedup"]) == pytest.approx(
        float(eager["p50"]) / float(ours["p50"]), rel=1e-3)
    assert rows["training", "eager"]["cuda_speedup"] == ""
    assert "cuda" in capsys.readouterr().out
    assert set(driver.launched) == {pretended_gpu.KERNEL, "prepare"}


def test_a_wrong_chain_on_csrc_cuda_is_no_match(tmp_path, monkeypatch):
    pretended_gpu.install(monkeypatch)
    right = launch.packed_conv2d
    monkeypatch.setattr(launch, "packed_conv2d", lambda *args, **kw: tuple(
        None if t is None else -t if t.is_floating_point() else t for t in right(*args, **kw)))
    with pytest.raises(SystemExit, match="do not match"):
        gpu_run(tmp_path)


def test_one_mode_alone(tmp_path):
    run = bench("--blocks", "32@4", "--batch", "1", "--threads", "1", "--mode", "inference",
                "--output", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "training" not in (tmp_path / "block.csv").read_text() + run.stdout


@pytest.mark.parametrize("options, message", [
    (("--blocks", "3x3:64@56"), "not channels@size"), (("--depth", "0"), "--depth must be 1")])
def test_bad_options_are_named(options, message):
    run = bench(*options)
    assert run.returncode == 2 and message in run.stderr
