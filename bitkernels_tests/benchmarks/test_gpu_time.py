"""benchmarks/gpu_time.py with graphs, events and streams that count instead of a GPU's."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch

from bitkernels_tests import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_time


class Graph:
    """Of torch.cuda.CUDAGraph what gpu_time uses; replays take `cost` of the calls captured."""

    time, capturing, pools = 0.0, None, ()

    def __init__(self):
        self.cost = 0.0

    def capture_begin(self, *pool):
        assert Graph.capturing is None
        Graph.capturing, Graph.pools = self, (*Graph.pools, *pool)

    def capture_end(self):
        Graph.capturing = None

    def replay(self):
        Graph.time += self.cost


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Graph.time

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def graphs(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(Graph, "time", 0.0)
    monkeypatch.setattr(Graph, "pools", ())
    for name, value in (
            ("CUDAGraph", Graph), ("Event", Event), ("Stream", Stream), ("current_stream", Stream),
            ("stream", lambda one: contextlib.nullcontext()), ("synchronize", lambda: None),
            ("empty_cache", lambda: None), ("graph_pool_handle", lambda: object())):
        monkeypatch.setattr(torch.cuda, name, value)


def call_of(milliseconds, seen=None):
    def call(number):
        if seen is not None:
            seen.append(number)
        if Graph.capturing is not None:
            Graph.capturing.cost += milliseconds

    return call


def test_graphs_are_timed_in_turns_and_errors_are_apart(graphs):
    def fails(number):
        if Graph.capturing is not None:
            raise ValueError("not in a capture")

    seen = []
    us, errors = gpu_time.in_turns({"a": (call_of(2.0, seen), 4), "b": (fails, 5),
                                    "c": (call_of(3.0), 10)})
    assert us == pytest.approx({"a": 2.0, "c": 3.0}) and list(errors) == ["b"]
    assert seen == [0, 1, 2, 0, 1, 2, 3]  # warmed up, then captured
    assert isinstance(errors["b"], ValueError) and len(set(Graph.pools)) == 2
    assert gpu_time.in_turns({"b": (fails, 1)})[0] == {}
    assert gpu_time.graph(lambda: call_of(2.0)(0)) == pytest.approx([2.0] * 15)


def test_a_context_that_does_not_answer_is_told(graphs, monkeypatch):
    def breaks(number):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: 1 / 0)
        raise RuntimeError("an illegal memory access")

    with pytest.raises(gpu_time.Broken) as found:
        gpu_time.in_turns({"a": (call_of(1.0), 2), "b": (breaks, 2)})
    assert found.value.name == "b" and "illegal" in str(found.value.__cause__)


def test_steps_are_timed_back_to_back(graphs):
    ran = []
    assert len(gpu_time.back_to_back(lambda: ran.append(1), 0.0)) == 1 and len(ran) == 3
    assert len(gpu_time.back_to_back(lambda: ran.append(1), 9.0, most=4)) == 4
