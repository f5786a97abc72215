"""A kernel loses its trust by its own faults alone."""

from __future__ import annotations

import contextlib
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import pytest
import torch

from bitkernels.backends import trust
from bitkernels.backends.trust import Capturing, Trust

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KEY = "packed_linear", "a kernel"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that works and is not captured, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.fixture
def ledger(gpu) -> Trust:
    made = Trust(lambda key, device, what: f"{key[1]} on {device} {what}; another runs")
    assert made.has(KEY, GPU, lambda: None)
    return made


def failing(*errors):
    """A call that raises these one after the other and then returns 1."""
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return 1

    return call


def trusted(ledger: Trust) -> bool:
    return ledger.has(KEY, GPU, lambda: pytest.fail("checked again"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("cuModuleLoadData: out of memory (2)"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
])
def test_lack_of_memory_is_one_error_and_no_verdict(error, ledger):
    with pytest.raises(torch.OutOfMemoryError):
        ledger.run(KEY, GPU, failing(error))
    assert trusted(ledger) and ledger.run(KEY, GPU, failing()) == 1
    fresh = Trust(lambda *a: "")
    with pytest.raises(torch.OutOfMemoryError):
        fresh.has(KEY, GPU, failing(error))
    assert fresh.has(KEY, GPU, lambda: None), "the next call checks again"


def test_an_error_of_someone_elses_kernel_is_raised(ledger, monkeypatch):
    """It stays in the context, so every later call meets it, whatever it runs."""
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="launch failed"):
        ledger.run(KEY, GPU, failing(RuntimeError("launch failed"), RuntimeError("launch failed")))
    assert trusted(ledger)


@pytest.mark.parametrize("error", [Capturing("not compiled"), RuntimeError("operation not permitted"
                                                                           " when capturing")])
def test_a_capture_that_cannot_go_on_is_raised(error, ledger, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(type(error), match=str(error)):
        ledger.run(KEY, GPU, failing(error))
    assert trusted(ledger)
    with pytest.raises(RuntimeError, match="checks the kernel and cannot be captured"):
        Trust(lambda *a: "").has(KEY, GPU, lambda: None)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_one_passing_error_is_forgiven(device, ledger):
    assert ledger.has(KEY, device, lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ledger.run(KEY, device, failing(ValueError("once"))) == 1
    assert ledger.has(KEY, device, lambda: pytest.fail("checked again"))


def test_two_errors_in_a_row_end_it_with_one_warning(ledger):
    with pytest.warns(UserWarning, match="a kernel on cuda:0 failed: ValueError: twice; another"):
        assert ledger.run(KEY, GPU, failing(ValueError("once"), ValueError("twice"))) is None
    assert not trusted(ledger) and "twice" in ledger.state(KEY, GPU)[1]
    ledger.clear()
    assert ledger.has(KEY, GPU, lambda: None)


@pytest.mark.parametrize("failure, said", [
    (lambda: "differs in case 3", "differs in case 3"), (failing(SyntaxError("x")), "SyntaxError")])
def test_a_check_that_fails_is_final(failure, said, gpu):
    made = Trust(lambda key, device, what: what)
    with pytest.warns(UserWarning, match=said):
        assert not made.has(KEY, GPU, failure)
    assert not trusted(made)


def test_a_kernel_may_run_inside_its_own_check(gpu):
    made = Trust(lambda *a: "")
    assert made.has(KEY, GPU, lambda: None if made.has(KEY, GPU, lambda: "again") else "locked out")


def test_no_other_thread_runs_a_kernel_while_it_is_checked(gpu):
    made, begun, end = Trust(lambda key, device, what: what), Event(), Event()

    def failure():
        begun.set()
        end.wait(5)
        return "differs"

    with ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match="differs"):
        first = pool.submit(made.has, KEY, GPU, failure)
        begun.wait()
        assert not made.passed(KEY, GPU)
        second = pool.submit(made.has, KEY, GPU, lambda: pytest.fail("checked again"))
        done, _ = wait([second], timeout=0.2)
        end.set()
        assert not done and not first.result() and not second.result()


def test_an_interrupted_check_is_none(gpu):
    made = Trust(lambda *a: "")
    with pytest.raises(KeyboardInterrupt):
        made.has(KEY, GPU, failing(KeyboardInterrupt()))
    assert made.state(KEY, GPU) == (True, "not checked yet")


def test_a_launch_that_fails_in_a_check_is_not_forgiven_by_it(gpu):
    made = Trust(lambda key, device, what: what)
    call = failing(ValueError("once"), ValueError("twice"))
    with pytest.warns(UserWarning, match="twice"):  # and another kernel gives the right values
        assert not made.has(KEY, GPU, lambda: made.run(KEY, GPU, call))


def test_calls_are_made_on_the_tensors_device(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    for index in (0, 1):
        with trust.on(torch.device("cuda", index)):
            pass
    assert entered == [1]


def test_why_a_backend_is_not_usable_is_asked_and_said_once():
    usable, asked = trust.Usable(), []

    def why(device):
        asked.append(device)
        return "no such thing"

    with pytest.warns(UserWarning, match="bitkernels: no such thing here") as said:
        for _ in range(2):
            assert usable.obstacle(CPU, why, lambda reason: f"{reason} here") == "no such thing"
    assert len(asked) == len(said) == 1
