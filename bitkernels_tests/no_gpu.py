"""Launches without a GPU: the drivers of Triton and of csrc/cuda with nothing behind them.

Kernels are compiled for sm_90 and never run. Inside `routed` the operators on the CPU's tensors
take the way of a GPU's: what the host does for a call can be counted and timed, and no result is
seen. The library's convolutions return memory as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bitkernels.backends import gpu, replay
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.cuda import launch
from bitkernels.backends.cuda.driver import Driver, Loaded
from bitkernels.backends.triton import configs, tuning
from bitkernels.backends.triton import dispatch as triton
from bitkernels.ops import _conv2d_backward, _training
from bitkernels.ops._record import OPERATORS, STRAIGHT
from bitkernels_tests import cuda_emulator

LAUNCH = """
int cuLaunchKernel(void) { return 0; }
int cuLaunchKernelEx(void) { return 0; }
int cuCtxGetCurrent(void** context) { *context = context; return 0; }
"""


def count_calls(call: Callable[[], object]) -> int:
    """Python functions and methods of C that a call enters: the same number in every run."""
    found = 0

    def count(frame, event, arg):
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            call()
    finally:
        sys.setprofile(None)
    return found


class NoGpu:
    """As much of a driver as launching asks for, tensors being on the CPU."""

    # Names and grids; compiled kernels keep their first one.
    launched: list[tuple[str, tuple[int, int, int]]] = []
    arguments: list[tuple] = []

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.utils = self

    def load_binary(self, name, kernel, shared, device):
        self.loaded.append(name)
        return 1, 1, 128, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132,
                "warpSize": 32}

    def launcher_cls(self, src, metadata):
        launched, arguments, name = self.launched, self.arguments, metadata.name

        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *args):
            launched.append((name, (x, y, z)))
            arguments.append(args)

        return launch

    def unload_module(self, module):
        pass

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def triton_driver() -> Iterator[NoGpu]:
    """Triton launches here; the list of launches is empty."""
    found, before = NoGpu(), dict(vars(driver))
    driver.set_active(found)
    tuning.tuner.cache_clear()
    found.launched.clear()
    found.arguments.clear()
    with mock.patch.object(configs, "family", lambda device: "sm90"):
        yield found
    tuning.tuner.cache_clear()
    vars(driver).update(before)


class NoDriver(Driver):
    """csrc/cuda is neither compiled nor launched; `Driver` packs what it would launch."""

    launches = 0

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp())
        (folder / "none.c").write_text(LAUNCH)
        subprocess.run([cuda_emulator.COMPILER, "-x", "c", "-shared", "-fPIC", "-o",
                        folder / "none.so", folder / "none.c"], check=True)
        super().__init__(str(folder / "none.so"))

    def build(self, kernel, spec, arch):
        return Loaded(self, 1, 1, 1)

    def unload(self, module: int, context: int) -> None:
        pass

    def launch(self, *args, **kw) -> None:
        NoDriver.launches += 1
        super().launch(*args, **kw)

    def _encoded(self, address, geometry):
        return ctypes.c_uint64()


def _convolution(input, weight, bias, stride, padding, dilation, transposed, padded, groups):
    sizes = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(
        input.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True))
    return input.new_empty((input.shape[0], weight.shape[0], *sizes)).contiguous(
        memory_format=torch.channels_last)


def _convolution_backward(grad, input, weight, bias, stride, padding, dilation, transposed, padded,
                          groups, mask):
    return (torch.empty_like(input) if mask[0] else None,
            torch.empty_like(weight) if mask[1] else None, None)


@contextlib.contextmanager
def routed(with_cuda: bool = True) -> Iterator[NoGpu]:
    """Operators on the CPU's tensors launch as a GPU's, Triton's kernels or csrc/cuda's before
    them; all kernels are trusted."""
    lib, aten = (torch.library.Library(name, "IMPL") for name in ("bitkernels", "aten"))
    NoDriver.launches = 0
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context

        def put(where, name, value):
            patch(mock.patch.object(where, name, value))

        found = patch(triton_driver())
        cuda.clear()
        triton.clear()
        put(cuda, "why_unusable", lambda device: None if with_cuda else "not asked for")
        put(cuda.usable, "_reasons", {})
        put(launch, "_driver", NoDriver() if with_cuda else None)
        put(triton, "why_unusable", lambda device: None)
        for backend in (cuda, triton):
            put(backend, "_trusted", lambda *arguments: True)
        put(replay, "same", lambda wanted, found: True)  # nothing is computed
        put(_conv2d_backward, "by_tables", lambda *arguments: (False, False))
        put(_training, "finish_weight_grad", lambda grad, weight, words, scale, train, *wants:
            _training.finish_in_one(grad, weight, scale, train, *wants))
        patch(mock.patch.dict(STRAIGHT, cpu=gpu.repeat))
        if with_cuda:
            patch(mock.patch.dict(os.environ, BITKERNELS_CUDA="1"))
        patch(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch says which kernels are replaced
        aten.impl("convolution", _convolution, "CPU")
        aten.impl("convolution_backward", _convolution_backward, "CPU")
        for name in triton.OPERATORS:
            operator = OPERATORS[name]
            if operator.launched:
                for overload in operator.overloads:
                    lib.impl(f"{name}.{overload}".rstrip("."),
                             operator.launcher(gpu.repeat, overload), "CPU", allow_override=True)
        try:
            yield found
        finally:
            lib._destroy()
            aten._destroy()
            cuda.clear()
            triton.clear()
