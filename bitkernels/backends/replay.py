"""Remembers what a part of an operator launches, and launches it again with other addresses.

Between two calls that look alike nothing differs but where the tensors are: kernels, grids, sizes
and allocations are the same. The first call runs, the second one is recorded (`_record`), the third
one runs both ways, which have to give the same bits (`_proven`), and from then on the recording
runs (`_Recording.run`): one look at the arguments, the allocations, the launches. What is not an
allocation, a view or a launch of ours makes a part one that always runs, and so does a recording
that gives something else.

Calls look alike where all agree that launches may depend on: shapes, strides and types, addresses
modulo 16, all other arguments, the device and the environment variables of the backends.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitkernels.backends.trust import is_current

MOST = 4096  # recordings, each of some kilobytes; then all are forgotten
VARIABLES = ("BITKERNELS_TRITON", "BITKERNELS_TRITON_INNER", "BITKERNELS_TRITON_AUTOTUNE",
             "BITKERNELS_CUDA", "BITKERNELS_CUDA_KERNEL")
_EMPTY = {f"aten::{name}" for name in (
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")}
_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN = frozenset((type(None), bool, int, float, str, tuple, torch.dtype))


class Watch(threading.local):
    """What this thread launches while it records.

    launches: None where it does not. Of each a function that makes the launch once more, of a
    stream and arguments with addresses in place of tensors, and the arguments that it had; None: it
    cannot be repeated.
    """

    launches: list[tuple[Callable[..., Any], list[Any]] | None] | None = None


watch = Watch()


class _Made(TorchDispatchMode):
    """Allocations, and whether anything else is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []  # kept: no address is used twice
        self.zeroed: list[bool] = []
        self.other = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._schema.name
        if name in _EMPTY or name == "aten::new_zeros":
            self.tensors.append(out)
            self.zeroed.append(name == "aten::new_zeros")
        elif not func.is_view:
            self.other = True
        return out


class _Recording(NamedTuple):
    """allocations: (size, strides, type, whether zeroed). launches: (function, arguments, of which
    these places are (place, tensor, bytes from its address)). results: numbers of tensors, which
    are the arguments' and then the allocated ones, or None; single: there is one, no tuple."""

    allocations: list[tuple[torch.Size, tuple[int, ...], torch.dtype, bool]]
    launches: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int, int]]]]
    results: list[int | None]
    single: bool

    def run(self, given: list[Tensor]) -> Any:
        """Raises LookupError where something it needs is gone."""
        device = given[0].device
        on_gpu, tensors = device.type == "cuda", given.copy()
        stream = torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0
        at = [t.data_ptr() for t in given]
        for size, strides, dtype, zeroed in self.allocations:
            t = torch.empty_strided(size, strides, dtype=dtype, device=device)
            address = t.data_ptr()
            if address % 16:
                raise LookupError("memory that is not aligned")
            if zeroed:
                t.zero_()
            tensors.append(t)
            at.append(address)
        for launch, arguments, places in self.launches:
            values = arguments.copy()
            for place, tensor, offset in places:
                values[place] = at[tensor] + offset
            launch(stream, values)
        found = [None if i is None else tensors[i] for i in self.results]
        return found[0] if self.single else tuple(found)


obstacles: list[Callable[[], bool]] = []  # of backends: whether nothing may be repeated now
_recordings: dict[tuple, _Recording | _Unproven | str] = {}
_ONCE, _NEVER = "ran once", "runs always"


def clear() -> None:
    """Forgets all."""
    _recordings.clear()


def call(run: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """`function(run, *args)`, which calls operators by `run`; remembered.

    It returns a tensor or a tuple of tensors and None, and reads no values of tensors.
    """
    given: list[Tensor] = []
    key: list[Any] = [function]
    for value in args:
        kind = type(value)
        if kind in _TENSORS:
            given.append(value)
            key += value.shape, value.stride(), value.dtype, value.data_ptr() % 16
        elif kind is float and not value:
            key.append(str(value))  # 0.0 and -0.0 are equal, but not as bounds or summands
        elif kind in _PLAIN:
            key.append(value)
        elif kind is list:
            key.append(tuple(value))
        elif isinstance(value, Tensor):  # of a class that wraps others
            return function(run, *args)
        else:
            key.append(value)
    device, environ = given[0].device, os.environ
    if not is_current(device) or any([hinders() for hinders in obstacles]):
        return function(run, *args)
    key.append(device)
    key += [environ[name] if name in environ else None for name in VARIABLES]
    at = tuple(key)
    found = _recordings.get(at)
    if type(found) is _Recording:
        try:
            return found.run(given)
        except Exception:  # it runs as the first time, which blames a kernel if it is to blame
            _recordings[at] = _ONCE
    elif found is None:
        if len(_recordings) >= MOST:
            clear()
        _recordings[at] = _ONCE
    elif found is _ONCE:
        results, recording = _record(run, function, args, given)
        _recordings[at] = _NEVER if recording is None else _Unproven(recording)
        return results
    elif type(found) is _Unproven:
        return _proven(at, found.recording, function, run, args, given)
    return function(run, *args)


class _Unproven(NamedTuple):
    recording: _Recording


def _proven(at: tuple, recording: _Recording, function: Callable[..., Any], run, args,
            given: list[Tensor]) -> Any:
    """What the function returns; its recording is used from now on if it returns the same."""
    results = function(run, *args)
    if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return results  # comparing would synchronize: another time
    wanted = (results,) if isinstance(results, Tensor) else results
    try:
        repeated = recording.run(given)
        found = (repeated,) if isinstance(repeated, Tensor) else repeated
        equal = all(map(same, wanted, found))
    except Exception:  # as a lack of memory
        _recordings[at] = _ONCE
        return results
    _recordings[at] = recording if equal else _NEVER
    if not equal:
        warnings.warn(f"bitkernels: repeating the launches of {function.__name__} gives other "
                      "results than the first time; it is launched anew in each call, which is "
                      "slower. Please report this.", stacklevel=2)
    return results


def same(wanted: Tensor | None, found: Tensor | None) -> bool:
    """Bit for bit."""
    if wanted is None or found is None:
        return wanted is found
    return wanted.shape == found.shape and wanted.dtype == found.dtype and (
        not wanted.numel() or torch.equal(_bytes(wanted), _bytes(found)))


def _bytes(t: Tensor) -> Tensor:
    """In the order of its elements; a last dimension of one element may have any stride."""
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)


def _record(run, function, args, given: list[Tensor]) -> tuple[Any, _Recording | None]:
    """(results of the call, its recording if there can be one)."""
    if watch.launches is not None:  # inside of another one, which sees all
        return function(run, *args), None
    watch.launches = []
    try:
        with _Made() as made:
            results = function(run, *args)
        launches = watch.launches
    finally:
        watch.launches = None
    return results, None if made.other else _recording(made, launches, results, given)


def _recording(made: _Made, launches, results, given: list[Tensor]) -> _Recording | None:
    tensors = [*given, *made.tensors]
    if any(t.data_ptr() % 16 for t in made.tensors):
        return None
    ranges = [(t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors]
    found = []
    for entry in launches:
        if entry is None:
            return None
        launch, arguments = entry
        values, places = list(arguments), []
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                number = _number(value, tensors, ranges)
                if number is None:
                    return None
                values[place] = 0
                places.append((place, number, value.data_ptr() - ranges[number][0]))
        found.append((launch, values, places))
    single = isinstance(results, Tensor)
    numbers: list[int | None] = []
    for result in (results,) if single else results:
        same = [] if result is None else [
            i for i, t in enumerate(tensors)
            if t is result or (i >= len(given) and _is_all_of(result, t))]
        if result is not None and (len(same) != 1 or same[0] in numbers):
            return None
        numbers.append(same[0] if same else None)
        if same and same[0] >= len(given):  # its sizes may be in another order
            tensors[same[0]] = result
    if not found and any(t.numel() for t in made.tensors):
        return None  # launched where nobody saw it
    allocations = [(t.shape, t.stride(), t.dtype, zeroed)
                   for t, zeroed in zip(tensors[len(given):], made.zeroed, strict=True)]
    return _Recording(allocations, found, numbers, single)


def _is_all_of(t: Tensor, other: Tensor) -> bool:
    """Whether they are the same memory and type, of whatever sizes."""
    return (t.numel() > 0 and t.data_ptr() == other.data_ptr() and t.dtype == other.dtype
            and t.numel() == other.numel() and _extent(t) == _extent(other))


def _extent(t: Tensor) -> int:
    """Bytes from its first to its last element."""
    if not t.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _number(t: Tensor, tensors: list[Tensor], ranges: list[tuple[int, int]]) -> int | None:
    """Of the one tensor that `t` is or is a part of; None where several overlap there."""
    same = [i for i, other in enumerate(tensors) if other is t]
    begin, end = t.data_ptr(), t.data_ptr() + _extent(t)
    around = [i for i, (first, last) in enumerate(ranges)
              if first < last and first < max(end, begin + 1) and begin < last]
    if not t.numel():
        return same[0] if len(same) == 1 else None
    return around[0] if len(around) == 1 and end <= ranges[around[0]][1] else None
