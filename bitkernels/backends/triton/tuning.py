"""The kernels of the products under `triton.autotune`, and which of their configurations runs.

Tuning is of speed alone: the configurations of a kernel give equal bits. It happens at the first
call of a shape class that is large, or of any where the environment asks for it, never at import,
and Triton keeps its result on disk. Where nothing can be timed (while a CUDA graph is captured, or
without memory for the timer's buffer) `configs.fixed_tile` runs, and a later call tunes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton

from bitkernels.backends.replay import watch
from bitkernels.backends.triton import configs
from bitkernels.backends.triton.b1 import b1_kernel
from bitkernels.backends.triton.configs import Size, Tile
from bitkernels.backends.triton.contraction import int8_kernel, popc_kernel
from bitkernels.backends.triton.launch import launch as launch_kernel

KERNELS = {"b1": b1_kernel, "int8": int8_kernel, "popc": popc_kernel}
# What the best configuration depends on, beside the types of the tensors, which Triton adds.
SHAPE_CLASS = ["size_class", "N", "KH", "KW", "WIDTH"]

_fixed: ContextVar[int | Tile | None] = ContextVar("fixed configuration", default=None)
_lock = threading.Lock()


class Untimed(Exception):
    """No configuration can be timed now."""


@contextlib.contextmanager
def fixed(choice: int | Tile) -> Iterator[None]:
    """Inside, this configuration runs, by number the last of a shorter table, and nothing is
    timed."""
    token = _fixed.set(choice)
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
def tuner(inner: str, tiles: tuple[Tile, ...]):
    """The kernel with configurations to choose from."""
    return triton.autotune(
        [triton.Config(t.tile, num_warps=t.warps, num_stages=t.stages, maxnreg=t.registers)
         for t in tiles],
        SHAPE_CLASS, do_bench=milliseconds, cache_results=not configs.interpreting(),
    )(KERNELS[inner])


def launch(inner: str, family: str, size: Size, grid, **arguments) -> None:
    """One call of a product's kernel; `grid` is a function of the configuration."""
    table, choice = configs.table(inner, family, size.flat), _fixed.get()
    if choice is None and configs.tunes(size):
        if watch.launches is not None:  # its launches are Triton's own
            watch.launches.append(None)
        with contextlib.suppress(Untimed), _lock:  # a tuner holds the arguments of one call
            tuner(inner, table)[grid](**arguments, enable_fp_fusion=False)
            return
    if choice is None:
        choice = configs.fixed_tile(inner, family, size)
    elif isinstance(choice, int):
        choice = table[min(choice, len(table) - 1)]
    kernel, given = KERNELS[inner], arguments | choice.tile
    names = kernel.arg_names
    numbers = names.index("size_class") + 1  # what follows is constexpr
    launch_kernel(kernel, grid(choice.tile), tuple([given[name] for name in names[:numbers]]),
                  (choice.warps, choice.stages, choice.registers, inner == "b1" or None),
                  **{name: given[name] for name in names[numbers:]})
