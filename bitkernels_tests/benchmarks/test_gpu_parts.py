"""The parts of benchmarks/gpu on the CPU: operands, right answers, checks, times, plan, training.

The emulator is in the place of the GPU, the reference in that of Triton, and a clock that gives
each call a shorter time than the one before.
"""

from __future__ import annotations

import contextlib
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
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import calls
import gpu_time
import record
from parts import block, compiling, correct, one, plan_table, speed

CPU = torch.device("cpu")
NAMES = ("mma_64x32", "resident_64x64")
TILES = ("triton", "triton:0", "triton:1")


def by_reference(op, args, kw):
    return getattr(reference, op)(*args, **kw)


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(calls, "by_triton", by_reference)
    monkeypatch.setattr(calls, "tiles", lambda call: TILES[1:])
    monkeypatch.setattr(calls, "in_tile", lambda number: contextlib.nullcontext())
    monkeypatch.setattr(calls.triton, "kernel", lambda op: getattr(reference, op))


@pytest.fixture
def emulated(monkeypatch, no_triton):
    if not cuda_emulator.available():
        pytest.skip(f"no C++ compiler ({cuda_emulator.COMPILER})")
    launch.clear()
    dispatch.clear()
    monkeypatch.setattr(launch, "_driver", cuda_emulator.EmulatedDriver())
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(dispatch, "why_unusable", lambda device: None)
    # Those of one image of 4 pixels a side that is not too much work for the emulator.
    monkeypatch.setattr(calls, "takers", lambda call, device: [
        k for k in launch.taking(kernels.FAMILIES["sm_90a"], call.op, *call.arguments())
        if k.name in NAMES] if call.op in dispatch.OPS else [])
    yield
    launch.clear()
    dispatch.clear()
    plan.table.cache_clear()


def small(output, batch=1, **kw):
    return calls.convolution(CPU, 64, 4, batch, output, **kw)


@pytest.mark.parametrize("shape", (dict(), dict(cin=32, stride=2), dict(cin=96, kernel=1)))
@pytest.mark.parametrize("output", calls.OUTPUTS)
def test_the_right_answer_of_a_convolution_is_the_references(output, shape, no_triton):
    call = small(output, 2, **shape)
    found = call.run(calls.TRITON)
    assert calls.difference(call, found, calls.expected(call)) is None
    changed = [None if t is None else t.clone() for t in found]
    for t in changed:
        if t is not None:
            t[(0,) * t.dim()] += 1
            assert "differs in 1 of" in calls.difference(call, changed, found)
            t[(0,) * t.dim()] -= 1
    assert "not torch.int64" in calls.difference(
        call, [None if t is None else t.float() for t in found],
        [None if t is None else t.long() for t in found])
    assert "output" in calls.difference(call, found[::-1], found)


@pytest.mark.parametrize("output", ("packed", "fp16"))
def test_the_right_answer_of_a_product_is_the_references(output, no_triton, monkeypatch):
    call = calls.product(CPU, 70, 64, 256, output)
    assert calls.difference(call, call.run(calls.TRITON), calls.expected(call)) is None
    monkeypatch.setattr(calls, "rows_of", lambda call: slice(0, 20))
    assert calls.difference(call, call.run(calls.TRITON), calls.expected(call)) is None


def test_operands_are_as_many_as_leave_the_cache():
    call = small("packed", cache=1 << 20)
    assert len(call.sets) == calls.COPIES and len(small("packed", cache=100).sets) == 2
    assert call.arguments(21)[0][0] is call.sets[1][0]
    assert len(small("packed").sets) == 1
    block_ = small("block", cache=4000)
    assert block_.arguments(1)[1]["residual"] is block_.sets[1][1]


def test_tiles_are_those_that_tuning_may_choose():
    """As the package's modules name them: on a GPU these are compiled and checked one by one."""
    from bitkernels.backends import gpus
    from bitkernels.backends.triton import configs, tuning

    with gpus.planning_for(gpus.named("sm_90")):
        large = calls.convolution(torch.device("meta"), 256, 14, 256, "packed")
        assert calls.inner_of(large.op, *large.arguments()) == "b1"
        assert calls.tiles(large) == tuple(map(calls.tile_name, range(
            len(configs.table("b1", "sm90")))))
        small_ = calls.convolution(torch.device("meta"), 256, 14, 64, "packed")
        assert calls.tiles(small_) == (calls.TRITON,)
    with calls.in_tile(1):
        assert tuning._fixed.get() == 1


def test_floors_are_those_of_the_analysis():
    """Of 3x3 256@14 at batch 256 and 64@56, block: 4.4 us at the peak, 53.6 us at 4.1 TB/s."""
    meta = torch.device("meta")
    call = calls.convolution(meta, 256, 14, 256, "packed")
    assert call.floors(4.1e12)["tensor"] == pytest.approx(3.82, abs=0.01)
    assert call.floors(4.1e12)["bytes"] == pytest.approx(0.8, abs=0.1)
    call = calls.convolution(meta, 64, 56, 256, "block")
    assert call.floors(4.1e12)["bytes"] == pytest.approx(53.6, rel=0.02)
    assert calls.product(meta, 8192, 8192, 8192, "packed").floors(1e12)["tensor"] == pytest.approx(
        70.9, abs=0.1)


def lines(folder, part):
    return record.rows(folder, part)


@pytest.fixture
def few(monkeypatch):
    """The calls of a run, of little work."""
    monkeypatch.setattr(calls, "SIZES", (64,))
    monkeypatch.setattr(calls, "COPIES", 2)
    defaults = calls.convolutions.__defaults__
    monkeypatch.setattr(calls.convolutions, "__defaults__",
                        (defaults[0], ((64, 4),), (1,), calls.OUTPUTS))


def test_checks_tell_right_wrong_and_broken(emulated, few, tmp_path, monkeypatch):
    kernel = kernels.ALL[NAMES[0]]
    one_ = record.Record(tmp_path, f"correct-{kernel.name}")
    assert correct.check(one_, kernel, CPU, correct.large(kernel, CPU))
    found = lines(tmp_path, "correct")
    keys = [row["key"] for row in found if "key" in row]
    assert [row["wrong"] for row in found if "key" in row] == [None] * len(keys)
    assert keys[:2] == ["3x3:64@4 batch 1 packed", "3x3:64@4 batch 1 fp16"]
    assert found[0] == {"kernel": kernel.name, "begun": keys[0]} and found[-1]["stopped"] is None
    right = launch.packed_conv2d
    monkeypatch.setattr(launch, "packed_conv2d", lambda *args, **kw: tuple(
        None if t is None else t + 1 for t in right(*args, **kw)))
    assert correct.check(one_, kernel, CPU, correct.large(kernel, CPU))
    bad, wrong = record.faulty(tmp_path)
    assert not bad and (kernel.name, keys[0]) in wrong
    assert not any(key.startswith("64x64x64") for _, key in wrong)
    monkeypatch.setattr(correct, "context_works", lambda: False)
    assert not correct.check(one_, kernel, CPU, correct.large(kernel, CPU))
    assert record.faulty(tmp_path)[0] == {kernel.name}


def test_checks_of_triton_are_of_every_tile(emulated, few, tmp_path):
    one_ = record.Record(tmp_path, "correct-triton")
    assert correct.check(one_, calls.TRITON, CPU, correct.large(calls.TRITON, CPU))
    found = [row for row in lines(tmp_path, "correct") if "key" in row]
    assert len(found) == len(calls.OUTPUTS) + 2 and not any(row["wrong"] for row in found)


def test_small_cases_are_those_of_the_package():
    named = dict(correct.samples(kernels.ALL["bulk_128x256"], CPU))
    assert list(named) == ["small cases of packed_linear"]
    named = dict(correct.samples(correct.OPERATORS, CPU))
    assert "small cases of rsign" in named and "small cases of packed_conv2d by popc" in named


def test_checks_stop_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(correct, "end_of_job", lambda: 0.0)
    one_ = record.Record(tmp_path, "correct-a")
    assert not correct.check(one_, "a", CPU, iter([("x", lambda: None)]))
    assert lines(tmp_path, "correct") == [{"kernel": "a", "stopped": "before x: out of time"}]


def timed(tmp_path, call, copies=2, others=None, **more):
    speed.one_row(record.Record(tmp_path, "conv"), call, copies, others or {}, 4e12, CPU, tmp_path,
                  **more)


def test_rows_have_every_kernel_and_leave_out_what_is_wrong(emulated, clock, tmp_path):
    call = small("packed", cache=1000)
    timed(tmp_path, call, others={"cudnn bf16": lambda i: None}, layer="64@4")
    (row,) = lines(tmp_path, "conv")
    assert set(row["us"]) == {*NAMES, *TILES, "cudnn bf16"} == set(row["warm"])
    assert row["layer"] == "64@4" and row["errors"] == {} and len(clock) == 2
    assert row["entry"] == {"op": "packed_conv2d", "rows": 16, "cout": 64, "products": 576,
                            "real": False}
    bad = record.Record(tmp_path, f"correct-{NAMES[0]}")
    bad.add(kernel=NAMES[0], key=call.name, wrong="output 1 differs")
    timed(tmp_path, call)
    row = lines(tmp_path, "conv")[-1]
    assert set(row["us"]) == {NAMES[1], *TILES} and "not exact" in row["errors"][NAMES[0]]
    bad.add(kernel=NAMES[0], begun="something")
    timed(tmp_path, small("fp16"))
    assert "hung" in lines(tmp_path, "conv")[-1]["errors"][NAMES[0]]


def test_one_kernel_that_raises_ends_nothing(emulated, clock, tmp_path, monkeypatch):
    right = launch.packed_conv2d

    def packed_conv2d(kernel, *args, **kw):
        if kernel.name == NAMES[0]:
            raise RuntimeError("no room")
        return right(kernel, *args, **kw)

    monkeypatch.setattr(launch, "packed_conv2d", packed_conv2d)
    timed(tmp_path, small("block"))
    (row,) = lines(tmp_path, "conv")
    assert set(row["us"]) == {NAMES[1], *TILES}
    assert row["errors"] == {NAMES[0]: "RuntimeError: no room"} and "entry" not in row


def test_a_kernel_that_breaks_the_gpu_is_left_out_in_a_new_process(emulated, clock, tmp_path,
                                                                  monkeypatch):
    def broken(runs, rounds=9):
        raise gpu_time.Broken(NAMES[0]) from RuntimeError("an illegal memory access")

    call = small("packed")
    with monkeypatch.context() as patch:
        patch.setattr(gpu_time, "in_turns", broken)
        patch.setattr(record.os, "execv", lambda *args: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            timed(tmp_path, call)
    timed(tmp_path, call)
    first, row = lines(tmp_path, "conv")
    assert "illegal" in first["error"] and row["errors"] == {NAMES[0]: "broke the GPU"}
    assert set(row["us"]) == {NAMES[1], *TILES}


def test_conv_and_gemm_go_through_their_calls(emulated, few, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "setup", lambda: (CPU, 1000))
    monkeypatch.setattr(speed, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    speed.conv(tmp_path)
    speed.gemm(tmp_path)
    conv, gemm = ([row for row in lines(tmp_path, part) if "key" in row]
                  for part in ("conv", "gemm"))
    assert [row["output"] for row in conv] == list(calls.OUTPUTS)
    order = [found[:3] for found in calls.convolutions(CPU, layers=((64, 4),), batches=(256, 1))]
    assert [o for o in order if o[1] == 256][-1] == ("64@4", 256, "moments int32")
    assert order.index(("64@4", 1, "packed")) < order.index(("64@4", 256, "moments int32"))
    assert len(set(order)) == len(order) == 2 * len(calls.OUTPUTS)
    assert [("cudnn bf16" in row["us"], "cudnn fp16" in row["us"]) for row in conv] == [
        (output in speed.BESIDE_LIBRARY,) * 2 for output in calls.OUTPUTS]
    assert all(set(NAMES) <= set(row["us"]) for row in conv[:4])
    assert [row["output"] for row in gemm] == ["packed", "fp16"]
    assert all({"cublas bf16", "triton", NAMES[0]} <= set(row["us"]) for row in gemm)
    speed.conv(tmp_path)  # again: nothing is left to do
    assert len([row for row in lines(tmp_path, "conv") if "key" in row]) == len(conv)
    monkeypatch.setattr(speed, "end_of_job", lambda: 0.0)
    speed.gemm(tmp_path / "late")
    assert "out of time" in lines(tmp_path / "late", "gemm")[-1]["stopped"]
    # What is profiled is what was fastest here.
    call = small("packed")
    assert one.kernel_of(tmp_path, call.name, call, CPU).name == NAMES[0]
    assert one.kernel_of(tmp_path / "late", call.name, call, CPU).name in NAMES
    assert one.named(correct.timed_calls(CPU), call.name).name == call.name
    assert block.fastest(tmp_path, call.name) == NAMES[0]


def test_the_plan_reads_what_was_timed(emulated, few, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "setup", lambda: (CPU, 1000))
    monkeypatch.setattr(speed, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(plan_table, "MORE", ((64, 32, 3, 3, 2),))
    monkeypatch.setattr(plan_table, "BATCHES", (1,))
    monkeypatch.setattr(plan_table, "MATRICES", ((70, 64, 256),))
    old = {"op": "packed_conv2d", "rows": 16, "cout": 64, "products": 576, "real": False,
           "us": {"triton": 1.0}}
    far = {**old, "rows": 10**6}
    package = tmp_path / "package.json"
    package.write_text(json.dumps({
        "sm_80": {"gpu": "another", "date": "2027-01-01", "calls": []},
        "sm_90a": {"gpu": "old", "date": "2026-01-01", "calls": [old, far]}}))
    monkeypatch.setattr(plan, "MEASURED", package)
    speed.conv(tmp_path)
    speed.gemm(tmp_path)
    right = launch.packed_linear
    monkeypatch.setattr(launch, "packed_linear", lambda kernel, *args, **kw: tuple(
        None if t is None else t + (kernel.name == NAMES[1]) for t in right(kernel, *args, **kw)))
    plan_table.run(tmp_path)
    path = tmp_path / "measured.json"
    monkeypatch.setattr(plan, "MEASURED", path)
    plan.table.cache_clear()
    assert plan.table()["sm_80"]["gpu"] == "another" and plan.table()["sm_90a"]["gpu"] == "a GPU"
    entries = plan.table()["sm_90a"]["calls"]
    assert old not in entries and far in entries
    sizes = [(entry["op"], entry["rows"], entry["real"]) for entry in entries]
    assert len(set(sizes)) == len(sizes)
    assert {("packed_conv2d", 16, False), ("packed_conv2d", 9, True),
            ("packed_linear", 64, True), ("packed_linear", 70, False)} <= set(sizes)
    assert all(plan.NEXT in entry["us"] and "cudnn bf16" not in entry["us"] for entry in entries)
    (matrix,) = [entry for entry in entries if entry["rows"] == 70 and not entry["real"]]
    assert set(matrix["us"]) == {plan.NEXT, NAMES[0]}  # the other differs
    assert any(NAMES[1] in row.get("wrong", "") for row in lines(tmp_path, "plan"))
    # Unasked, the fastest of the measured ones runs.
    args = words_of(80, 256), words_of(60, 256), 256
    why = dispatch.explain("packed_linear", *args, real=False, packed=True)
    assert why.kernel is None or why.kernel == NAMES[0]
    speed_of = {name: matrix["us"][name] for name in matrix["us"]}
    assert (why.kernel == NAMES[0]) == (speed_of[NAMES[0]] < speed_of[plan.NEXT])


def test_processes_share_the_jobs_of_compilation(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("nvrtc")

    ran = []
    jobs = [("a", lambda: ran.append("a")), ("b", fails), ("c", lambda: ran.append("c"))]
    assert compiling.claim(tmp_path, "c")
    first = record.Record(tmp_path, "compile-0")
    compiling.work(first, iter(jobs), tmp_path)
    compiling.work(record.Record(tmp_path, "compile-1"), iter(jobs), tmp_path)
    assert ran == ["a"]
    assert [(row["key"], row.get("failed")) for row in lines(tmp_path, "compile")] == [
        ("a", None), ("b", "RuntimeError: nvrtc")]
    monkeypatch.setattr(compiling, "end_of_job", lambda: 0.0)
    compiling.work(first, iter(jobs), tmp_path / "late")
    assert lines(tmp_path, "compile")[-1]["stopped"] == "before a: out of time"


def test_a_call_without_operands_ends_no_list(emulated, few, monkeypatch, tmp_path):
    def no_room(*args, **kw):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(calls, "convolution", no_room)
    monkeypatch.setattr(speed, "setup", lambda: (CPU, 1000))
    monkeypatch.setattr(speed, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = dict(compiling.of_calls([no_room, lambda: calls.product(CPU, 64, 64, 64, "fp16")], CPU))
    assert list(found)[:2] == ["call 0", "triton 64x64x64 fp16"]
    with pytest.raises(torch.OutOfMemoryError):
        found["call 0"]()
    found = dict(correct.large(kernels.ALL[NAMES[0]], CPU))
    assert "no room" in found["call 0"]() and found["64x64x64 packed"]() is None
    speed.conv(tmp_path)
    plan_table.run(tmp_path)
    assert sum("no room" in row.get("failed", "") for row in lines(tmp_path, "conv")) == 6
    assert any(row.get("key", "").startswith("64x1024") for row in lines(tmp_path, "plan"))


def test_compilation_builds_what_is_timed_and_launches_nothing(emulated, few, monkeypatch):
    monkeypatch.setattr(plan_table, "MORE", ((64, 32, 3, 3, 2),))
    monkeypatch.setattr(plan_table, "BATCHES", (1,))
    monkeypatch.setattr(plan_table, "MATRICES", ())
    driver = launch.driver()
    compiling.without_launches(driver)
    built = []
    build = type(driver).build
    monkeypatch.setattr(type(driver), "build", lambda self, kernel, spec, arch: built.append(
        kernel.name) or build(self, kernel, spec, arch))
    monkeypatch.setattr(compiling, "run_tiles", lambda call: call.run(calls.TRITON))
    names = []
    for name, job in compiling.jobs(CPU):
        if "small cases" in name:  # of Triton's kernels: they need it; of ours: many
            continue
        names.append(name)
        job()
    assert "triton 3x3:64@4 batch 1 moments int16" in names
    assert f"{NAMES[0]} 64x64x64 packed" in names
    assert f"{NAMES[1]} 3x3/2:32-64@3 batch 1 fp16" in names
    assert set(NAMES) <= set(built)


def test_whole_networks_are_compiled_without_launches(emulated, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch.trust, "has", dispatch.trust.has)  # as it was, afterwards
    monkeypatch.setattr(compiling.inductor, "autotune_local_cache", True)
    ran = []
    monkeypatch.setattr(compiling.block, "warm", lambda: ran.append("block"))
    monkeypatch.setattr(compiling.train, "warm", lambda *args: ran.append(args) or 1 / 0)
    compiling.whole(tmp_path, "block")
    monkeypatch.setattr(compiling.models, "warm", ran.append)
    compiling.whole(tmp_path, "reactnet18 published")
    compiling.whole(tmp_path, "models quicknet")
    assert ran == ["block", ("reactnet18", "published"), "quicknet"]
    good, _, bad = lines(tmp_path, "compile")
    assert good["key"] == "torch.compile block" and "ZeroDivision" in bad["failed"]
    assert dispatch.trust.has(("packed_conv2d", "any"), CPU, lambda: "differs")
    assert launch.driver().launch(1, 2, 3) is None


def test_kernels_at_fault_run_no_block(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "ALL", dict(kernels.ALL))
    record.Record(tmp_path, "correct-a").add(kernel=NAMES[0], key="x", wrong="differs")
    assert block.without_faulty(tmp_path) == {NAMES[0]} and NAMES[0] not in kernels.ALL


def test_tasks_are_recorded_each_by_itself(tmp_path, monkeypatch):
    def fails():
        raise ValueError("out of memory")

    one_ = record.Record(tmp_path, "block")
    block.run_tasks(one_, [("a", lambda: {"x": 1}), ("b", fails)])
    a, b = lines(tmp_path, "block")
    assert a["x"] == 1 and b["failed"] == "ValueError: out of memory"
    block.run_tasks(record.Record(tmp_path, "block"), [("a", fails)])
    assert len(lines(tmp_path, "block")) == 2


def test_checks_wait_for_memory():
    turns = iter([torch.OutOfMemoryError("no room"), torch.OutOfMemoryError("no room"), None])

    def failure():
        error = next(turns)
        if error is not None:
            raise error
        return "differs"

    assert correct.with_memory(failure, 0.0) == "differs"


def test_a_kernel_that_breaks_the_gpu_in_the_plan_is_left_out_next_time(emulated, tmp_path,
                                                                       monkeypatch):
    def fails(*args, **kw):
        raise RuntimeError("an illegal memory access")

    call, name = small("packed"), calls.takers(small("packed"), CPU)[0].name
    monkeypatch.setattr(plan_table, "context_works", lambda: False)
    monkeypatch.setattr(record.os, "execv", lambda *args: (_ for _ in ()).throw(SystemExit))
    one_ = record.Record(tmp_path, "plan")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(launch, "packed_conv2d", fails)
        plan_table.right(call, CPU, one_)
    again = record.Record(tmp_path, "plan")
    assert again.bad == {f"{name} {call.name}"}
    assert plan_table.right(call, CPU, again) == {}
