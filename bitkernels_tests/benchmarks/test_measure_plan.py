"""benchmarks/gpu/measure_plan.py, with the emulator in the place of the GPU."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch

from bitkernels import reference
from bitkernels.backends.cuda import dispatch, kernels, launch, plan
from bitkernels_tests import ROOT, cuda_emulator
from bitkernels_tests.cases import words_of

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import measure_plan

if not cuda_emulator.available():
    pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})", allow_module_level=True)

CPU = torch.device("cpu")
NAMES = ("mma_64x32", "resident_64x64")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    launch.clear()
    dispatch.clear()
    monkeypatch.setattr(launch, "_driver", cuda_emulator.EmulatedDriver())
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: None)
    monkeypatch.setattr(measure_plan.triton, "run",
                        lambda op, *args, **kw: getattr(reference, op)(*args, **kw))
    yield
    launch.clear()
    dispatch.clear()
    plan.table.cache_clear()


def clock(call, repeats):
    """Every call is faster than the one before it: Triton is the slowest."""
    call()
    return [1.0 / next(clock.turns)] * repeats


def measured(path, names=NAMES):
    clock.turns = itertools.count(1)
    found = list(measure_plan.calls(CPU, ((64, 64, 4, 3, 1),), (1,), ((70, 64, 256),)))
    return measure_plan.run(CPU, "a GPU", found, names, path, clock)


def test_the_table_that_it_writes_is_what_the_plan_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"sm_80": {"gpu": "another", "date": "2027-01-01", "calls": []}}))
    assert measured(path) == 0
    monkeypatch.setattr(plan, "MEASURED", path)
    plan.table.cache_clear()
    assert plan.table()["sm_80"]["gpu"] == "another"
    entries = plan.table()["sm_90a"]["calls"]
    assert [entry["op"] for entry in entries] == ["packed_conv2d"] * 2 + ["packed_linear"] * 2
    assert [entry["real"] for entry in entries] == [False, True] * 2
    assert all(set(entry["us"]) == {plan.NEXT, *NAMES} for entry in entries)
    assert entries[0]["rows"] == 16 and entries[0]["products"] == 576
    # Unasked, the fastest of the measured ones runs, and nothing far away.
    args = words_of(80, 256), words_of(60, 256), 256
    why = str(dispatch.explain("packed_linear", *args, real=False, packed=True))
    assert why.startswith(f"cuda: {min(NAMES, key=entries[2]['us'].get)}, measured near")
    far = words_of(5000, 256), words_of(60, 256), 256
    assert "proven near" in dispatch.explain("packed_linear", *far, real=False, packed=True).reason
    assert "over triton" in capsys.readouterr().out


def test_a_wrong_kernel_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    right = launch.packed_linear
    monkeypatch.setattr(launch, "packed_linear", lambda kernel, *args, **kw: tuple(
        None if t is None or kernel.name != NAMES[0] else t + 1
        for t in right(kernel, *args, **kw)))
    path = tmp_path / "measured.json"
    assert measured(path, NAMES[:1]) == 1
    calls = json.loads(path.read_text())["sm_90a"]["calls"]
    assert [set(call["us"]) for call in calls] == [{plan.NEXT, NAMES[0]}] * 2 + [{plan.NEXT}] * 2
    assert f"WRONG in 70x64x256 fp16: {NAMES[0]} differs" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "measured.json"
    assert measure_plan.main(["--output", str(path)]) == 1 and not path.exists()
    assert "no GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        measure_plan.main(["--kernels", kernels.PREPARE.name])
