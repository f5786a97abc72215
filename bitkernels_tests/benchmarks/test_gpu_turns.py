"""How kernels that run only where a GPU has measured them get to be measured: checked and timed by
gpu-check like the others, each in a process of its own, and then named by its measured.json."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bitkernels.backends.cuda import dispatch, kernels, launch, plan
from bitkernels_tests import ROOT
from bitkernels_tests.cases import words_of

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import calls
import check
import record
import summary
from parts import plan_table, speed

CPU = torch.device("cpu")
NAMES = [kernel.name for kernel in kernels.ALL.values() if kernel.measured_only]
NAME, BASE = "resident_64x128_turns", "resident_64x128"


def test_each_is_checked_in_a_process_of_its_own(monkeypatch, tmp_path):
    assert NAMES == [kernel.name for kernel in kernels.TURNS] and NAME in NAMES
    assert {job.name for job in check.correct_jobs(tmp_path)} >= {*NAMES, BASE}
    monkeypatch.setattr(check, "sanitizer", lambda: ("/opt/compute-sanitizer",))
    together = [job.command[job.command.index("--job") + 1].split(",")
                for job in check.sanitizer_jobs(tmp_path)]
    assert all(set(names) <= set(NAMES) for names in together if set(names) & set(NAMES))
    assert {*NAMES, BASE} <= set().union(*together)


def test_each_is_timed_beside_the_others(monkeypatch):
    monkeypatch.setattr(calls, "architecture", lambda device: "sm_90a")
    call = calls.convolution(CPU, 128, 4, 1, "packed")
    found = [kernel.name for kernel in calls.takers(call, CPU)]
    assert {*NAMES, BASE} <= set(found) and found.index(BASE) < found.index(NAME)
    assert summary.short(NAME) == "r_64x128t" and summary.short(f"{BASE}_bulk") == "r_64x128+"


@pytest.mark.parametrize("broken", (False, True))
def test_what_was_measured_runs_by_the_new_table(broken, monkeypatch, tmp_path):
    """A made-up run, in which it is the fastest, and one in which its check broke the context."""
    call = calls.convolution(CPU, 128, 4, 1, "packed")
    row = {"key": call.name, "entry": speed.entry(call),
           "us": {"triton": 9.0, BASE: 7.0, NAME: 6.0, "cudnn bf16": 20.0}}
    record.Record(tmp_path, "conv").add(**row)
    checked = record.Record(tmp_path, f"correct-{NAME}")
    if broken:
        checked.add(kernel=NAME, key=call.name, wrong="illegal instruction", broken=True)
    else:
        checked.add(kernel=NAME, key=call.name, wrong=None)
        checked.add(kernel=NAME, stopped=None)
    package = tmp_path / "package.json"
    package.write_text("{}")
    monkeypatch.setattr(plan, "MEASURED", package)
    entries = plan_table.known(record.rows(tmp_path, "conv"), tmp_path)
    plan_table.write(tmp_path / "measured.json", "sm_90a", "a GPU", entries)
    table = json.loads((tmp_path / "measured.json").read_text())
    assert [list(entry["us"]) for entry in table["sm_90a"]["calls"]] == [
        ["triton", BASE] if broken else ["triton", BASE, NAME]]

    monkeypatch.setattr(plan, "table", lambda: table)
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: None)
    monkeypatch.setattr(dispatch, "_trusted", lambda *args: True)
    ran: list[str] = []
    monkeypatch.setattr(launch, "packed_conv2d",
                        lambda kernel, *args, **kw: ran.append(kernel.name) or (None, args[0]))
    args, kw = (words_of(1, 4, 4, 128), words_of(128, 3, 3, 128), 128, (1, 1), (1, 1)), call.kw
    for asked in (None, "1"):
        if asked:
            monkeypatch.setenv("BITKERNELS_CUDA", asked)
        dispatch.clear()
        dispatch.attempt("packed_conv2d", args, kw)
        assert ran.pop() == (BASE if broken else NAME)
    dispatch.clear()
