"""Times on a GPU that the host does not show in: milliseconds of calls with a cold cache, or in a
CUDA graph. Needs nothing but torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(calls):
            call()
    captured.replay()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        captured.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return times
