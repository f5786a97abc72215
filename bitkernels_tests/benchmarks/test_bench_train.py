"""benchmarks/bench_train.py end to end on small images: files written, outputs correct."""

import csv
import functools
import json
import sys

import pytest

from bitkernels_tests import ROOT
from bitkernels_tests.benchmarks import program

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

sys.path.insert(0, str(ROOT / "benchmarks"))
bench = functools.partial(program, "bench_train.py", "--quick", "--device", "cpu")
PROVIDERS = ("published", "lean", "layers", "bitkernels")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench_train")
    run = bench("--threads", "1", "--output", str(output))
    assert run.returncode == 0, run.stderr
    return output, run.stdout


def test_table_and_csv(results):
    output, printed = results
    with (output / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["network"], r["precision"], r["kernel_provider"]) for r in rows] == [
        (network, precision, provider) for network in ("reactnet18", "quicknet")
        for precision in ("fp32", "bf16") for provider in PROVIDERS]
    assert [r["match"] for r in rows if r["kernel_provider"] == "bitkernels"] == ["True"] * 4
    assert all(float(r["images_per_second"]) > 0 and r["network"] in printed for r in rows)


def test_fused_blocks_keep_least(results):
    """By most in fp32 without the stem, most of which is the same in every form."""
    output, _ = results
    record = json.loads((output / "train.json").read_text())
    assert {"device", "torch", "bitkernels", "kernel", "date"} <= set(record["environment"])
    for row in record["rows"]:
        saved, recomputed = row["saved"], row["saved_recomputed_stem"]
        for kept in (saved, recomputed):
            assert kept["bitkernels"] < kept["layers"] < kept["lean"] <= kept["published"]
        assert all(recomputed[p] < saved[p] for p in PROVIDERS)
        if (row["network"], row["precision"]) == ("reactnet18", "fp32"):
            assert recomputed["published"] > 3.5 * recomputed["bitkernels"]
    assert (output / "train.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision,least", (("fp32", 4.5), ("bf16", 3.5)))
def test_reactnet18_keeps_a_fraction_at_full_size(precision, least):
    """The whole network on images of 224, weights not counted, against the published form."""
    import bench_train
    import common

    case = bench_train.Case("reactnet18", precision, 2, 224, 4, common.CpuDevice(), False)
    kept = case.saved(checkpoint_stem=False)
    assert kept["published"] > least * kept["bitkernels"]


@pytest.mark.parametrize("options, message", [
    (("--size", "16"), "--size must be 32"), (("--batch", "1"), "--batch must be 2"),
    (("--memory-limit", "4"), "--memory-limit is of a GPU")])
def test_bad_options_are_named(options, message):
    run = bench(*options)
    assert run.returncode == 2 and message in run.stderr
