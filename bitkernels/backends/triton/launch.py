"""Launches Triton's kernels, at a fraction of the host time that Triton's own way takes.

`kernel[grid](...)` binds and specializes its arguments, makes a string of the options and looks for
hooks and changed globals in every call. Here that happens once for what is to be compiled; later
calls with the same key give addresses and numbers straight to the compiled kernel. The key holds
all that Triton compiles for: the device; types; whether 16 divides an address or a number; None,
numbers that are 1, and those beyond int32; the constants and options. It does not hold TRITON_DEBUG
and the like, which count at a kernel's first call.

Triton's own way runs where it does more: in its interpreter, on AMD, whose kernels also depend on
the size of a tensor's memory, and with a profiler's hooks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from bitkernels.backends import replay
from bitkernels.backends.triton.jit import OVERLAPS

# The last one: whether the kernel may start while the one before it ends (`jit.begin`).
OPTIONS = "num_warps", "num_stages", "maxnreg", "launch_pdl"


class _Ready(NamedTuple):
    run: Any
    function: int
    metadata: Any
    kept: tuple  # the kernel, whose identity is in the key, and what was compiled


_ready: dict[tuple, _Ready] = {}  # for ever, as Triton keeps them


def launch(kernel: Any, grid: tuple[int, int], args: tuple, options: tuple[int | None, ...],
           **constants: Any) -> None:
    """`kernel[grid](*args, **constants, **options)`, without fused multiply-add, on the current
    stream of the current device.

    options: values of `OPTIONS`, or of the first of them; None: Triton's. constants: the constexpr
    parameters, each always of one type, in their order, which end the kernel's.
    """
    if type(kernel) is not JITFunction:
        _tritons_way(kernel, grid, args, options, constants)
        return
    active, fixed = driver.active, (*constants.values(),)
    device = active.get_current_device()
    key: list[Any] = [id(kernel), device, options, fixed]
    add, values = key.append, []
    for value in args:
        kind = type(value)
        if kind is int:
            values.append(value)
            if value == 1:
                add(1)
            elif -0x80000000 <= value < 0x80000000:
                add(2 if value % 16 == 0 else 3)
            else:  # int64, beyond it uint64
                add((4 if value % 16 == 0 else 5) + 2 * (value >= 1 << 63))
        elif value is None or kind is float or kind is bool:
            values.append(value)
            add(kind)
        else:
            address = value.data_ptr()
            values.append(address)
            add(value.dtype)
            add(address % 16 == 0)
    at = tuple(key)
    found = _ready.get(at)
    if found is None or _hooks():
        assert (*constants,) == (*kernel.arg_names[len(args):],)
        compiled = _tritons_way(kernel, grid, args, options, constants)
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            _ready[at] = _Ready(compiled.run, compiled.function, compiled.packed_metadata,
                                (kernel, compiled))
        return
    if replay.watch.launches is not None:
        replay.watch.launches.append((_again(found, grid), [*args, *fixed]))
    found.run(grid[0], grid[1], 1, active.get_current_stream(device), found.function,
              found.metadata, None, None, None, *values, *fixed)


def _tritons_way(kernel: Any, grid, args, options, constants) -> Any:
    if replay.watch.launches is not None:
        replay.watch.launches.append(None)
    given = {name: value for name, value in zip(OPTIONS, options, strict=False)
             if value is not None}
    if "launch_pdl" in given and not _overlaps(kernel):
        del given["launch_pdl"]
    return kernel[grid](*args, **constants, enable_fp_fusion=False, **given)


def _overlaps(kernel: Any) -> bool:
    if type(kernel) is not JITFunction or not OVERLAPS.value:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def _again(found: _Ready, grid: tuple[int, int]) -> Any:
    """For `replay`."""
    run, function, metadata, (x, y) = found.run, found.function, found.metadata, grid

    def again(stream: int, values: list[Any]) -> None:
        run(x, y, 1, stream, function, metadata, None, None, None, *values)

    return again


def _hooks() -> bool:
    """Whether somebody wants to hear of launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


replay.obstacles.append(_hooks)
