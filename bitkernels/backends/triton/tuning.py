"""The kernels of the products under `triton.autotune`, and which of their configurations runs.

Tuning is of speed alone: the configurations of a kernel give equal bits. It happens at the first
call of a shape class, never at import, and Triton keeps its result on disk. Where nothing can be
timed (while a CUDA graph is captured, or without memory for the timer's buffer) the first
configuration runs, and a later call tunes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton

from bitkernels.backends.triton import configs
from bitkernels.backends.triton.b1 import b1_kernel
from bitkernels.backends.triton.contraction import int8_kernel, popc_kernel

KERNELS = {"b1": b1_kernel, "int8": int8_kernel, "popc": popc_kernel}
# What the best configuration depends on, beside the types of the tensors, which Triton adds.
SHAPE_CLASS = ["size_class", "N", "KH", "KW", "WIDTH"]

_fixed: ContextVar[int | None] = ContextVar("fixed configuration", default=None)
_lock = threading.Lock()


class Untimed(Exception):
    """No configuration can be timed now."""


@contextlib.contextmanager
def fixed(number: int) -> Iterator[None]:
    """Inside, this configuration runs, or the last of a shorter table, and nothing is timed."""
    token = _fixed.set(number)
    try:
        yield
    finally:
        _fixed.reset(token)


def size_class(rows: int) -> int:
    """One number for all row counts up to the next power of two."""
    return rows.bit_length()


def milliseconds(call, quantiles):
    if torch.cuda.is_current_stream_capturing():
        raise Untimed
    try:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)
    except torch.OutOfMemoryError as error:
        raise Untimed from error


@functools.cache
def tuner(inner: str, family: str, number: int | None):
    """The kernel with one configuration, or with all of its family's to choose from."""
    table = configs.table(inner, family)
    if number is not None:
        table = (table[min(number, len(table) - 1)],)
    return triton.autotune(
        [triton.Config(c.tile, num_warps=c.warps, num_stages=c.stages) for c in table],
        SHAPE_CLASS, do_bench=milliseconds, cache_results=not configs.interpreting(),
    )(KERNELS[inner])


def launch(inner: str, family: str, grid, **arguments) -> None:
    """One call of a product's kernel; `grid` is a function of the configuration."""
    number = _fixed.get()
    if number is None and configs.autotuning():
        with contextlib.suppress(Untimed), _lock:  # a tuner holds the arguments of one call
            tuner(inner, family, None)[grid](**arguments)
            return
    tuner(inner, family, number or 0)[grid](**arguments)
