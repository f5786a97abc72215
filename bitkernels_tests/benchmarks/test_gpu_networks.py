"""The parts of benchmarks/gpu with blocks and networks, on the CPU: block, trunk, train, digits."""

from __future__ import annotations

import sys

import pytest
import torch

from bitkernels_tests import ROOT

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import record
from parts import block, digits, stem, train, trunk

KERNEL = "resident_64x64"


def lines(folder, part):
    return record.rows(folder, part)


def test_exact_chains_are_the_references(monkeypatch):
    monkeypatch.setattr(block, "DEVICE", "cpu")
    monkeypatch.setattr(block, "BATCH", 2)
    fused = block.Fused(block.blocks(32, 3))
    x = torch.randn(2, 32, 5, 5)
    assert torch.equal(block.expected(fused, x), fused.expected(x))
    made = trunk.bench_trunk.Trunk(2, 8, 2, trunk.common.CpuDevice())
    assert trunk.bench_trunk.matches(lambda: trunk.expected(made), made.expected())


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """torch.cuda's questions about memory and its waiting, on a CPU."""
    for name, value in (("synchronize", None), ("empty_cache", None), ("memory_allocated", 1 << 20),
                        ("reset_peak_memory_stats", None), ("max_memory_allocated", 5 << 20)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)


def test_blocks_are_timed_by_form(clock, no_gpu_needed, tmp_path, monkeypatch):
    monkeypatch.setattr(block, "DEVICE", "cpu")
    monkeypatch.setattr(block, "BATCH", 2)
    monkeypatch.setattr(block, "STEPS", 1)
    monkeypatch.setattr(torch, "compile", lambda model, **kw: model)
    monkeypatch.setattr(block, "traced", lambda step: step() or {"device us": 1.0, "launches": 2})
    found = block.inference(32, 4, tmp_path)
    assert list(found["us"]) == ["eager", "compiled", "triton", "cuda"]
    assert found["wrong"] == found["errors"] == {}
    for make in block.forms(32).values():
        row = block.training(make, 32, 4)
        assert row["peak MiB"] == 4 and row["wall us"] > 0 and row["launches"] == 2
        assert row["graph us"] > 0


def test_a_trunk_is_timed_by_backend(clock, no_gpu_needed, tmp_path, monkeypatch):
    monkeypatch.setattr(trunk.common, "GpuDevice", trunk.common.CpuDevice)
    monkeypatch.setattr(trunk.bench_trunk, "DEPTH", 1)
    monkeypatch.setattr(trunk.bench_trunk, "SIZE", 8)
    monkeypatch.setitem(trunk.COPIES, 2, 2)
    conv = record.Record(tmp_path, "conv")
    conv.add(key="3x3:64@8 batch 2 packed", us={KERNEL: 1.0, "mma_64x32": 2.0, "triton": 0.5})
    found = trunk.one(2, tmp_path)
    assert found["kernels"] == [KERNEL, None, None, None] and found["wrong"] == {}
    assert list(found["us"])[:3] == ["triton", "cuda", "mixed"] and len(found["us"]) == 5


def test_a_step_as_a_graph(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(train.bench_train, "StepDevice", train.common.CpuDevice)
    monkeypatch.setattr(train.bench_train, "BLOCKS", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 << 20)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    ran = []

    def in_turns(calls):
        ran.extend(call(0) for call, number in calls.values() for _ in range(number))
        return dict.fromkeys(calls, 4.0), {}

    monkeypatch.setattr(train.gpu_time, "in_turns", in_turns)
    monkeypatch.setattr(train, "traced", lambda step, *args: {"launches": 2})
    case = train.make_case("reactnet18", 2, 32)
    assert train.graph(case, "layers") == {"ms": 4.0, "images/s": 500.0, "peak MiB": 3.0,
                                           "launches": 2}
    assert len(ran) == 1
    failing = RuntimeError("a capture that ends")
    monkeypatch.setattr(train.gpu_time, "in_turns", lambda calls: ({}, dict.fromkeys(
        calls, failing)))
    with pytest.raises(RuntimeError, match="a capture that ends"):
        train.graph(case, "layers")


def test_training_rows_come_form_by_form(no_gpu_needed, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train.bench_train, "StepDevice", train.common.CpuDevice)
    monkeypatch.setattr(train.bench_train, "BLOCKS", 1)
    monkeypatch.setattr(torch, "compile", lambda model, **kw: model)
    monkeypatch.setattr(train, "SECONDS", 0.01)
    monkeypatch.setattr(train, "make_case",
                        lambda name, make=train.make_case: make(name, 2, 32))
    one_, done = record.Record(tmp_path, "train"), []
    train.networks(one_, ("reactnet_a",), tmp_path, done)
    keys = [row["key"] for row in lines(tmp_path, "train")]
    forms = [f"reactnet_a {form}" for form in train.FORMS]
    assert keys == [*forms[:3], "reactnet_a match", *forms[3:]]
    assert forms[:3] == [f"reactnet_a {form}" for form in (
        "published", "published compiled", "bitkernels")]
    assert not any("failed" in row for row in lines(tmp_path, "train"))
    assert lines(tmp_path, "train")[3]["first block close to the emulation"] is True
    assert (tmp_path / "train.csv").read_text().count("reactnet_a") == 8
    assert (tmp_path / "train.png").exists() and done[0].match
    monkeypatch.setattr(train, "end_of_job", lambda: 0.0)
    train.networks(one_, ("quicknet",), tmp_path, done)
    assert "out of time" in lines(tmp_path, "train")[-1]["stopped"] and len(done) == 1


@pytest.mark.parametrize("form", ("bitkernels", "layers"))
def test_steps_with_pytorchs_tools(monkeypatch, form):
    for name, value in (("DEVICE", "cpu"), ("IMAGES", 4), ("SIDE", 32)):
        monkeypatch.setattr(train, name, value)
    found = train.scaled(form)
    assert found["yes"] and found["steps"] > 2 and found["scale"] < 2.0**22
    assert train.parallel(form) == {"yes": True, "distance": 0.0}
    assert not torch.distributed.is_initialized()


def test_a_stem_on_squares_of_pixels_is_the_convolution(clock, monkeypatch):
    for name, value in (("DEVICE", "cpu"), ("DTYPE", torch.float64), ("BATCH", 2), ("SIZE", 18),
                        ("CHANNELS", 8)):
        monkeypatch.setattr(stem, name, value)
    found = stem.probe()
    assert found["yes"] and not found["errors"] and len(found["us"]) == 6
    assert max(found["distance"].values()) < 1e-6  # measured in float32


def test_digits_are_learned(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(digits, "STARTS", (0.0, 1e-6))
    digits.run(tmp_path, "cpu")
    (found,) = lines(tmp_path, "digits")
    assert 0.5 < found["from"] <= found["accuracy"] <= found["to"]
    assert found["epochs"] == digits.EPOCHS


@pytest.mark.parametrize("limit, expected", [(7, 0), (8, 8), (100, 96), (1000, 1000), (1001, 1000)])
def test_the_largest_batch_within_a_limit(limit, expected):
    def peak(batch):
        return batch if batch < 2000 else None

    assert train.bench_train.largest_batch(peak, limit) == expected


def test_the_largest_batches_of_every_form(no_gpu_needed, monkeypatch):
    """A step that has no room, or a network that has none, is a batch that is too large."""
    made = []

    class Case:
        def __init__(self, name, precision, batch, *rest):
            made.append(batch)
            if batch > 100:
                raise torch.OutOfMemoryError("no room for the network")
            self.models, self.batch = dict(zip(forms, forms, strict=True)), batch

        def step(self, form):
            if form == "published" and self.batch > 20:
                raise torch.OutOfMemoryError("no room for the step")

    class Device(train.common.CpuDevice):
        def peak_memory(self, call):
            call()
            return 10 * made[-1]

    forms = tuple(train.bench_train.FORMS)
    monkeypatch.setattr(train.bench_train, "Case", Case)
    found = train.bench_train.batches_within("reactnet18", "bf16", 224, 4, Device(), 10_000)
    assert found == {form: 16 if form == "published" else 96 for form in forms}
