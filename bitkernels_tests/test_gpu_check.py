"""benchmarks/gpu_check.py without a GPU: its goals, its time limits, its shards of the tests."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bitkernels_tests import conftest


@pytest.fixture
def script(monkeypatch):
    def load(name):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
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
