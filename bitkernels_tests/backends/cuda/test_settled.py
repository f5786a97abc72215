"""Which filters a launch may read before the one before it has ended."""

import numpy as np
import pytest
import torch

from bitkernels.backends import gpu, replay
from bitkernels.backends.cuda import kernels, launch, selfcheck, settled
from bitkernels_tests import cuda_emulator
from bitkernels_tests.cases import ConvCase


@pytest.fixture(autouse=True)
def forgotten():
    settled.clear()
    yield
    settled.clear()


def test_what_was_read_and_is_as_it_was():
    t = torch.zeros(4, dtype=torch.int32)
    assert not settled.has(t)
    settled.add(t)
    assert settled.has(t) and settled.has(t[1:]) and settled.has(t.view(2, 2))
    t[0] = 1
    assert not settled.has(t)
    settled.add(t)
    assert settled.has(t)


def test_no_other_tensor_gets_its_place():
    """Also at the same address, with the same version."""
    memory = np.zeros(64, dtype=np.int32)
    t = torch.from_numpy(memory)
    settled.add(t)
    at = t.data_ptr(), t._version
    del t
    for _ in range(8):
        fresh = torch.from_numpy(memory)
        assert (fresh.data_ptr(), fresh._version) == at and not settled.has(fresh)
        del fresh


def test_what_has_no_version_is_never_settled():
    with torch.inference_mode():
        t = torch.zeros(4)
    settled.add(t)
    assert not settled.has(t)


def test_entries_are_few(monkeypatch):
    monkeypatch.setattr(settled, "MOST", 3)
    kept = [torch.zeros(2) for _ in range(4)]
    for t in kept:
        settled.add(t)
    assert [settled.has(t) for t in kept] == [False, False, False, True]


@pytest.mark.skipif(not cuda_emulator.available(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ("resident_64x64", "resident_64x128", "resident_64x64_bulk"))
def test_calls_that_read_them_early_are_the_same(emulated, name):
    """The emulator fails where a kernel reads what the one before it may be writing."""
    case = ConvCase(channels=128, out_channels=64, size=(8, 8), batch=2)
    words, filters = case.words()
    kernel, args = kernels.ALL[name], (words, filters, 128, *case.args)
    first, _ = launch.packed_conv2d(kernel, *args, dtype=torch.int32)
    settled.add(filters)
    again, _ = launch.packed_conv2d(kernel, *args, dtype=torch.int32)
    assert torch.equal(first, again)


def record(emulated, monkeypatch):
    """What each launch is told."""
    told, launched = [], emulated.launch

    def launch_(*args, **kw):
        told.append(args[5].settled)
        return launched(*args, **kw)

    monkeypatch.setattr(emulated, "launch", launch_)
    return told


@pytest.mark.skipif(not cuda_emulator.available(), reason="no C++ compiler")
def test_a_call_marks_its_filters(emulated, monkeypatch):
    """From the second on, until they change, also where launches are repeated; what each launch
    was told."""
    told = record(emulated, monkeypatch)
    monkeypatch.setattr(gpu.cuda, "attempt", lambda op, args, kw: launch.packed_conv2d(
        kernels.ALL["resident_64x64"], *args, **kw))
    replay.clear()
    words, filters = ConvCase(channels=64, size=(4, 4), out_channels=64).words()

    def call(filters):
        told.clear()
        gpu.repeat("packed_conv2d", words, filters, 64, (1, 1), (1, 1), dtype=torch.int32)
        return set(told)

    assert call(filters) == {0} and call(filters) == {1}
    filters.add_(0)
    assert call(filters) == {0}
    for _ in range(5):
        assert call(filters) == {1}
    assert [type(entry) for entry in replay._recordings.values()].count(replay._Recording) == 1
    fresh = filters.clone()
    assert call(fresh) == {0} and call(fresh) == {1}
    replay.clear()


@pytest.mark.skipif(not cuda_emulator.available(), reason="no C++ compiler")
def test_the_check_at_first_use_reads_them_early_too(emulated, monkeypatch):
    told, case = record(emulated, monkeypatch), selfcheck.cases("packed_conv2d")[-1]
    monkeypatch.setattr(selfcheck, "cases", lambda op: [case])
    kernel, device = kernels.ALL["resident_64x64"], torch.device("cpu")
    with settled.answering(False):  # as a call that has found them not settled
        assert selfcheck.failure("packed_conv2d", kernel, device) is None
    assert told == [0, 1]
    real = launch.packed_conv2d

    def wrong(*args, **kw):
        out, signs = real(*args, **kw)
        return out + 1 if settled.has(args[2]) else out, signs

    monkeypatch.setattr(launch, "packed_conv2d", wrong)
    assert "output 0, with filters read before: " in selfcheck.failure(
        "packed_conv2d", kernel, device)


@pytest.mark.skipif(not cuda_emulator.available(), reason="no C++ compiler")
def test_another_thread_reads_the_filters_meanwhile(emulated, monkeypatch):
    """What is remembered of a call of filters that were not settled waits for them."""
    told = record(emulated, monkeypatch)

    def attempt(op, args, kw):
        settled.add(args[1])  # as the other thread does, after this one has looked
        return launch.packed_conv2d(kernels.ALL["resident_64x64"], *args, **kw)

    monkeypatch.setattr(gpu.cuda, "attempt", attempt)
    replay.clear()
    words, filters = ConvCase(channels=64, size=(4, 4), out_channels=64).words()
    for _ in range(4):  # runs, is recorded, is proven, is repeated
        gpu.repeat("packed_conv2d", words, filters.clone(), 64, (1, 1), (1, 1), dtype=torch.int32)
    assert set(told) == {0}
    assert any(type(entry) is replay._Recording for entry in replay._recordings.values())
    replay.clear()
