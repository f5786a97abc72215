"""Times on a GPU that the host does not show in: milliseconds of calls with a cold cache, or in a
CUDA graph. Needs nothing but torch.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch

SWEEP = 256 << 20  # bytes read between calls: more than any L2 cache
CYCLES = 2e9  # a second of the fastest GPU clock, and more


def cold(call: Callable[[], object], repeats: int = 25) -> list[float]:
    """Each call with the L2 cache swept before it.

    The sweep reads: written lines would still be on their way to memory during the call. The GPU
    sleeps first for as long as the host needs to enqueue the call, so that it never waits for it.
    """
    sweep = torch.zeros(SWEEP // 4, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    events = []
    for _ in range(repeats):
        torch.cuda._sleep(int(CYCLES * (2 * host + 3e-4)))
        sweep.sum()
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        call()
        pair[1].record()
        events.append(pair)
        if len(events) % 8 == 0:
            torch.cuda.synchronize()  # the queue of launches must not fill up
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]


def graph(call: Callable[[], object], calls: int = 10, repeats: int = 15) -> list[float]:
    """One call of `calls` in a replayed CUDA graph: operands as warm as they fit."""
    captured_ = captured(lambda number: call(), calls)
    captured_.replay()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        captured_.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return times


def captured(call: Callable[[int], object], calls: int, pool=None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of call(0), call(1), ...

    Not by torch.cuda.graph(), which collects garbage and empties the cache before each.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(min(calls, 3)):
            call(number)
    torch.cuda.synchronize()
    found = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        found.capture_begin(*(() if pool is None else (pool,)))
        try:
            for number in range(calls):
                call(number)
        except BaseException:
            with contextlib.suppress(Exception):
                found.capture_end()
            raise
        found.capture_end()
    return found


class Broken(RuntimeError):
    """The GPU's context does not answer any more, since the call of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def in_turns(calls: Mapping[str, tuple[Callable[[int], object], int]], rounds: int = 9
             ) -> tuple[dict[str, float], dict[str, Exception]]:
    """(medians in milliseconds of one call, errors), by name: each as `number` calls in a graph.

    The graphs are replayed in turns, so that what the clock does meets all of them. Raises Broken.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    errors: dict[str, Exception] = {}
    pool = torch.cuda.graph_pool_handle()  # one for all: no graph's output is looked at
    for name, (call, number) in calls.items():
        try:
            graphs[name] = captured(call, number, pool)
            graphs[name].replay()
            torch.cuda.synchronize()
        except Exception as error:
            graphs.pop(name, None)
            errors[name] = error
            try:
                torch.cuda.synchronize()
            except Exception:
                raise Broken(name) from error
            pool = torch.cuda.graph_pool_handle()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds if graphs else 0):
        next(iter(graphs.values())).replay()  # the first that is timed starts behind another too
        pairs = []
        for name, one in graphs.items():
            pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pair[0].record()
            one.replay()
            pair[1].record()
            pairs.append((name, pair))
        torch.cuda.synchronize()
        for name, (first, last) in pairs:
            samples[name].append(first.elapsed_time(last) / calls[name][1])
    graphs.clear()
    torch.cuda.empty_cache()  # what graphs have held goes back in no other way
    return {name: statistics.median(taken) for name, taken in samples.items()}, errors


def back_to_back(call: Callable[[], object], seconds: float, most: int = 30) -> list[float]:
    """Seconds of a call, of pairs one behind the other, by the host's clock; at least one pair."""
    call()
    torch.cuda.synchronize()
    taken: list[float] = []
    while not taken or (2 * sum(taken) < seconds and len(taken) < most):
        start = time.perf_counter()
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / 2)
    return taken
