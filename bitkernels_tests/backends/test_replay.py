"""What is remembered of launches, with launches that compute: at addresses, on the CPU."""

from __future__ import annotations

import ctypes
import warnings

import pytest
import torch

from bitkernels.backends import replay


def copy_floats(stream, values) -> None:
    """Of (from, to, how many, added): to = from + added."""
    source, target, count, added = values
    read = (ctypes.c_float * count).from_address(source)
    write = (ctypes.c_float * count).from_address(target)
    for i in range(count):
        write[i] = read[i] + added


def launch(source: torch.Tensor, target: torch.Tensor, count: int, added: float) -> None:
    if replay.watch.launches is not None:
        replay.watch.launches.append((copy_floats, [source, target, count, added]))
    copy_floats(0, [source.data_ptr(), target.data_ptr(), count, added])


def run(name, *args):
    raise AssertionError("these functions call no operators")


def double_step(run, x, added):
    """x + added by way of a temporary, its last element from a view; and zeros of another type."""
    calls.append("plain")
    between, out = x.new_empty(x.numel()), torch.empty_like(x)
    launch(x, between, x.numel(), 0.0)
    launch(between, out, x.numel(), added)
    launch(between[-1:], out.as_strided((1,), (1,), x.numel() - 1), 1, added)
    return out, None, x.new_zeros((2, 3), dtype=torch.int64)


calls: list[str] = []
WAYS = [lambda t: t, lambda t: t[1:], lambda t: t[4:], lambda t: t[::1].view(3, -1)]


@pytest.fixture(autouse=True)
def forgotten():
    replay.clear()
    calls.clear()
    yield
    replay.clear()


@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("size", (1, 12, 15, 16, 17))
def test_the_same_again(way, size):
    for _ in range(5):
        x = WAYS[way](torch.randn(size + 4))
        out, none, zeros = replay.call(run, double_step, x, 1.5)
        assert torch.equal(out, x + 1.5) and none is None and not zeros.any()
        assert zeros.dtype == torch.int64 and out.data_ptr() != x.data_ptr()
    assert len(calls) == 3


def test_what_looks_different_is_another_call():
    """Sizes, strides, types, alignment, arguments and the environment."""
    long = torch.randn(64)
    looks = [(long[:32], 0.5), (long[1:33], 0.5), (long[2:34], 0.5), (long[:16], 0.5),
             (long[:32].view(4, 8), 0.5), (long[:32].view(4, 8).t(), 0.5), (long[:32], 0.25),
             (long[:36].view(6, 6), 0.5), (long[:36].view(6, 6).t(), 0.5)]
    for x, added in looks:
        replay.call(run, double_step, x, added)
    assert len(calls) == len(looks)
    for x, added in looks:
        for _ in range(3):
            out = replay.call(run, double_step, x, added)[0]
            assert torch.equal(out, x + added)
    assert len(calls) == 3 * len(looks)


def test_both_zeros_are_arguments_of_their_own():
    """They are equal; -0.0 + 0.0 is 0.0, and -0.0 + -0.0 is not."""
    def step(run, x, added):
        out = torch.empty_like(x)
        launch(x, out, x.numel(), added)
        return out

    x = torch.full((4,), -0.0)
    for added in 4 * [0.0] + 4 * [-0.0]:
        assert replay.call(run, step, x, added).signbit().all() == (str(added) == "-0.0")


@pytest.mark.parametrize("name", replay.VARIABLES)
def test_the_environment_is_asked_in_every_call(name, monkeypatch):
    x = torch.randn(8)
    for _ in range(3):
        replay.call(run, double_step, x, 1.0)
    monkeypatch.setenv(name, "7")
    replay.call(run, double_step, x, 1.0)
    assert len(calls) == 4


def test_views_of_arguments_and_of_results():
    def function(run, x, y):
        out = torch.empty(2, 3)
        launch(x[1], out, 3, 0.0)
        launch(y.view(-1)[2:], out[1], 3, 0.0)
        return out.t()

    for _ in range(4):
        x, y = torch.randn(2, 3), torch.randn(5)
        out = replay.call(run, function, x, y)
        assert torch.equal(out, torch.stack((x[1], y[2:])).t()) and out.stride() == (1, 3)
    assert isinstance(next(iter(replay._recordings.values())), replay._Recording)


def runs_always(function, *args) -> bool:
    """From the second call on, which finds that it cannot be recorded, without a trial."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            replay.call(run, function, *args)
    return list(replay._recordings.values()) == ["runs always"]


def test_what_computes_runs_always():
    def function(run, x):
        calls.append("plain")
        out = torch.empty_like(x)
        launch(x, out, x.numel(), 0.0)
        out.mul_(2)
        return out

    assert runs_always(function, torch.randn(5)) and len(calls) == 3


def test_what_repeats_wrongly_runs_always():
    """It depends on what no argument tells."""
    def function(run, x):
        calls.append("plain")
        out = torch.empty_like(x)
        launch(x, out, x.numel(), float(len(calls)))
        return out

    x = torch.zeros(5)
    for number in (1, 2):
        assert replay.call(run, function, x)[0] == number
    with pytest.warns(UserWarning, match="repeating the launches of function gives other results"):
        assert replay.call(run, function, x)[0] == 3
    assert replay.call(run, function, x)[0] == 4
    assert list(replay._recordings.values()) == ["runs always"]


def test_the_same_bits():
    nan = torch.tensor([float("nan"), -0.0])
    assert replay.same(nan, nan.clone()) and replay.same(None, None)
    assert not replay.same(nan, torch.tensor([float("nan"), 0.0]))
    assert not replay.same(nan, None) and not replay.same(nan, nan[:1])
    image = torch.randn(2, 3, 4, 4)
    assert replay.same(image, image.to(memory_format=torch.channels_last))
    assert replay.same(torch.empty(0), torch.empty(0))
    row = torch.randn(2, 33, 1, 1).to(memory_format=torch.channels_last)
    assert row.stride(-1) == 33 and replay.same(row, row.clone()) and not replay.same(row, row + 1)
    assert replay.same(row[:1, :1], row[:1, :1].contiguous())


def test_arguments_that_overlap_run_always():
    """Which of them a launch reads cannot be told from an address."""
    def function(run, x, y):
        out = torch.empty_like(y)
        launch(y, out, y.numel(), 0.0)
        return out

    x = torch.randn(8)
    assert runs_always(function, x, x[2:5])


def test_launches_that_nobody_saw_run_always():
    def function(run, x):
        out = torch.empty_like(x)
        copy_floats(0, [x.data_ptr(), out.data_ptr(), x.numel(), 0.0])
        return out

    assert runs_always(function, torch.randn(5))


def test_a_launch_that_cannot_be_repeated():
    def function(run, x):
        replay.watch.launches is not None and replay.watch.launches.append(None)
        return torch.empty_like(x)

    assert runs_always(function, torch.randn(5))


def test_a_returned_argument_is_the_argument():
    def function(run, x, y):
        out = torch.empty_like(y)
        launch(y, out, y.numel(), 1.0)
        return x, out

    for _ in range(4):
        x = torch.randn(3)
        assert replay.call(run, function, x, torch.randn(4))[0] is x


def test_a_failing_launch_runs_as_the_first_time(monkeypatch):
    x = torch.randn(8)
    for _ in range(3):
        replay.call(run, double_step, x, 1.0)
    recording = next(iter(replay._recordings.values()))

    def fail(stream, values):
        raise RuntimeError("no launch")

    recording.launches[1] = (fail, *recording.launches[1][1:])
    assert torch.equal(replay.call(run, double_step, x, 1.0)[0], x + 1.0) and len(calls) == 4


def test_nothing_is_repeated_where_a_backend_says_so(monkeypatch):
    monkeypatch.setattr(replay, "obstacles", [lambda: True])
    for _ in range(4):
        replay.call(run, double_step, torch.randn(8), 1.0)
    assert len(calls) == 4


def test_recordings_are_few(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 5)
    for size in range(1, 20):
        replay.call(run, double_step, torch.randn(size), 1.0)
    assert len(replay._recordings) <= 5
