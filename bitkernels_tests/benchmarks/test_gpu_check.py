"""benchmarks/gpu/gpu_check.py and gpu_check_cuda.py without a GPU: goals, limits, shards, steps."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from torch import cuda as cuda_of_torch

from bitkernels.backends.cuda import kernels
from bitkernels_tests import ROOT, conftest


@pytest.fixture
def script(monkeypatch):
    def load(name):
        for folder in ("", "gpu"):
            monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
        return importlib.import_module(name)

    return load


def by_text(goals):
    return {goal.text: goal for goal in goals}


def test_without_results_no_goal_is_met_or_missed(script):
    goals = list(script("gpu_goals").goals({"conv": {"error": "took more than 70 s"}}))
    assert len(goals) == 20 and all(goal.met is None for goal in goals)
    assert "not measured" in goals[0].line()


def test_goals_compare_with_what_is_asked(script):
    goals = by_text(script("gpu_goals").goals({
        "selfcheck": {"rsign": "exact", "unpack": "differs", "seconds": 3.0},
        "tests": {"not passed": {}},
        "linear": {"times": {"cublas bf16": {"cold": 1.4}, "b1 fp16 out": {"cold": 0.3},
                             "int8 fp16 out": {"error": "OutOfResources"}}},
        "conv": {"layers": {"64@56": {"cudnn bfloat16": {"cold": 0.1},
                                      "b1 fp16 in and out": {"cold": 0.08},
                                      "int8 fp16 in and out": {"cold": 0.05}}}},
        "block": {"training": {"compiled": {"cold": 3.0, "peak MiB": 100.0},
                               "binary compiled": {"cold": 2.5, "peak MiB": 40.0}}},
        "bandwidth": {"times": {"copy": {"GB/s": 4000.0}, "rprelu": {"GB/s": 3000.0}}},
    }))
    met = {text: goal.met for text, goal in goals.items() if goal.met is not None}
    assert met == {
        "operators that differ from the reference, or fail": False,
        "test jobs that do not pass on the GPU": True,
        "linear 8192^3, b1, fp16 out: times cuBLAS bf16": True,
        "conv 64@56, fp16 in and out: times cuDNN bf16": True,
        "block, training step: times compiled emulation": False,
        "block, training step: peak memory of compiled emulation's": True,
        "rprelu: of measured copy bandwidth": False,
    }
    assert goals["rprelu: of measured copy bandwidth"].measured == 0.75


@pytest.mark.parametrize("code,error", [
    ("import sys, time; print('bitkernels: warned', file=sys.stderr, flush=True); time.sleep(60)",
     "took more than 3 s"),
    ("raise SystemExit('no such part')", "no such part"),
    ("print('RESULT {\"a\": 1}')", None),
])
def test_a_part_that_hangs_or_fails_is_recorded(script, monkeypatch, code, error):
    check = script("gpu_check")
    monkeypatch.setitem(check.LIMITS, "conv", 3 if error == "took more than 3 s" else 60)
    monkeypatch.setattr(check, "_start", lambda name: subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True))
    result = check.run_part("conv")
    assert (result.get("error") or "").strip() == (error or "")
    assert error or result["a"] == 1
    assert ("bitkernels: warned" in result.get("warnings", ())) == ("warned" in code)


def test_parts_stay_within_eight_minutes(script):
    assert sum(script("gpu_check").LIMITS.values()) <= 475


def test_shards_are_all_the_tests_once(monkeypatch):
    class Item:
        def get_closest_marker(self, name):
            return None

    every, seen = [Item() for _ in range(7)], []
    for shard in range(3):
        monkeypatch.setenv("BITKERNELS_TEST_SHARD", f"{shard}/3")
        items = list(every)
        conftest.pytest_collection_modifyitems(items)
        seen += items
    assert len(seen) == 7 and set(seen) == set(every)


@pytest.fixture
def cuda(script, monkeypatch, tmp_path):
    """gpu_check_cuda, which writes to a temporary folder, with a sanitizer to start."""
    pytest.importorskip("tabulate")
    check = script("gpu_check_cuda")
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(script("common"), "RESULTS", tmp_path)
    return check


def listed(check, quick=False):
    return list(check.steps(kernels.FAMILIES["sm_90a"], quick))


def test_cuda_steps_stay_within_26_minutes(cuda):
    limits = {one.group or one.name: one.limit for one in listed(cuda)}
    assert sum(limits.values()) <= 26 * 60
    families = {one.name.split()[1].split("_")[0] for one in listed(cuda)
                if one.name.startswith("check ")}
    assert families == set(kernels.FAMILIES["sm_90a"])
    names = [one.name for one in listed(cuda)]
    assert len(set(names)) == len(names)
    assert all(one.needs in ("", *names) for one in listed(cuda))
    assert not any("memcheck" in one.name for one in listed(cuda, quick=True))


@pytest.mark.parametrize("name", ("gemm", "conv", "trunk", "block"))
def test_cuda_steps_call_the_benchmarks_as_they_take_it(name, cuda, script, monkeypatch):
    pytest.importorskip("tqdm")
    (one,) = [one for one in listed(cuda) if one.name == name]
    module = script(f"bench_{name}")
    assert one.command[1] == f"benchmarks/bench_{name}.py"
    assert one.command[-2:] == ["--output", str(cuda.results() / "cuda")]

    class Parsed(Exception):
        pass

    def run(*arguments):
        raise Parsed

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module.common, "pick_device", lambda name: module.common.CpuDevice())
    with pytest.raises(Parsed):
        module.main(one.command[2:])


def written(name, rows):
    """A program that writes a csv file as a benchmark's."""
    lines = [rows[0], *(row.values() for row in rows)]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    return (f"import pathlib; p = pathlib.Path({str(name)!r}); p.parent.mkdir(exist_ok=True); "
            f"p.write_text({text!r})")


def test_cuda_run_ends_with_its_goals(cuda, monkeypatch, capsys):
    """Steps that pass, fail and hang, on a pretended H200."""
    name = "a GPU"
    for attribute, value in (("is_available", True), ("get_device_name", name),
                             ("get_device_capability", (9, 0))):
        monkeypatch.setattr(cuda_of_torch, attribute, lambda value=value: value)
    folder = cuda.results() / "cuda"
    python = [sys.executable, "-c"]
    gemm = [{"size": size, "provider": provider, "POPS": rate, "over bf16": over}
            for size, provider, rate, over in (
                (4096, "cuda packed", 4.5, 6), (8192, "cuda packed", 6.5, 9),
                (8192, "triton packed", 9, 20))]
    conv = [{"layer": "3x3:256@14", "batch": batch, "kernel_provider": provider,
             "speedup_over_bf16": over}
            for batch, provider, over in ((64, "cuda packed", 2), (256, "cuda packed", 9),
                                          (256, "cuda fp16", 4.9), (256, "triton fp16", 8))]
    trunk = [{"provider": "cuda packed", "graph over bf16": 5.5}]
    block = [{"mode": "inference", "block": "256@14", "batch": 256, "kernel_provider": "compiled",
              "cuda_speedup": 4.5}]
    done = [cuda.Step("check a", [*python, "print('exact')"], 60),
            cuda.Step("check b", [*python, "raise SystemExit('differs')"], 60),
            *(cuda.Step(f"tests {n}", [*python, "import time; time.sleep(60)" if n else "pass"], 3,
                        group="tests") for n in range(2)),
            cuda.Step("memcheck b", [*python, "pass"], 60, needs="check b")]
    for table, rows in (("gemm", gemm), ("conv", conv), ("trunk", trunk), ("block", block)):
        fails = "; raise SystemExit(1)" if table == "block" else ""
        done.append(cuda.Step(table, [*python, written(folder / f"{table}.csv", rows) + fails], 60))
    monkeypatch.setattr(cuda, "steps", lambda families, quick: done)
    monkeypatch.setattr(sys, "argv", ["gpu_check_cuda.py"])
    assert cuda.main() == 1
    report = json.loads((cuda.results() / "gpu_check_cuda.json").read_text())
    failed = {name: step.get("failed") for name, step in report["steps"].items()}
    assert failed["check a"] is failed["tests 0"] is failed["gemm"] is None
    assert failed["check b"] == "exit 1" and failed["block"] == "exit 1"
    assert failed["tests 1"].startswith("no end after")
    assert failed["memcheck b"] == "not run, since check b failed"
    goals = {goal["text"]: goal for goal in report["goals"]}
    assert {text: goal["met"] for text, goal in goals.items() if goal["met"] is not None} == {
        "kernels that differ from the reference, fail or hang": False,
        "shards of the tests that do not pass": False,
        "product 4096^3, packed out: POPS": True,
        "product 8192^3, packed out: POPS": False,
        "product 8192^3, packed out: times cuBLAS bf16": True,
        "conv 256@14, fp16 in and out: times cuDNN bf16": False,
        "conv 256@14, packed in and out: times cuDNN bf16": True,
        "trunk in a CUDA graph: of cuDNN bf16's time": True,
    }
    trunk_goal = goals["trunk in a CUDA graph: of cuDNN bf16's time"]
    assert trunk_goal["measured"] == pytest.approx(1 / 5.5) and trunk_goal["at_most"]
    printed = capsys.readouterr().out
    assert "not measured block 256@14" in printed and "MISSED" in printed and "met " in printed


def test_cuda_goals_of_files_from_an_earlier_run_are_not_measured(cuda):
    folder = cuda.results() / "cuda"
    folder.mkdir(parents=True)
    (folder / "gemm.csv").write_text("size,provider,POPS\n4096,cuda packed,9\n")
    assert cuda.measured({}) == {} and list(cuda.measured({"gemm": {}})) == ["gemm"]
    goals = list(cuda.gpu_goals.cuda_goals({}, {}))
    assert len(goals) == 16 and all(goal.met is None for goal in goals)
