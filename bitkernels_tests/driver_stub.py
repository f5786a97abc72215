"""The real `Driver` on emulator/driver_stub.c: what launchers ask for is checked, nothing computed.

A launch is refused without a context current in its thread, with a function that another context
loaded or whose module is unloaded, and with a pointer to memory that no living tensor has. A module
is not unloaded while a kernel of it may run.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from bitkernels.backends.cuda.driver import Driver
from bitkernels_tests import cuda_emulator


def build() -> Path:
    """A library of its own for each call, since it keeps state."""
    library = Path(tempfile.mkdtemp()) / "libcuda_stub.so"
    subprocess.run([cuda_emulator.COMPILER, "-x", "c", "-shared", "-fPIC", "-w", "-o", library,
                    cuda_emulator.FOLDER / "driver_stub.c"], check=True)
    return library


class Living(TorchFunctionMode):
    """The tensors that torch's functions returned while it was on, and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def add(self, value) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(weakref.ref(value))
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.add(item)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.add(found)
        return found

    def ranges(self) -> Iterator[tuple[int, int]]:
        for reference in self.tensors:
            tensor = reference()
            if tensor is not None and tensor.numel():
                storage = tensor.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()


class StubDriver(Driver):
    """Memory of the CPU counts as that of device 0, whose tensors have no index."""

    def __init__(self) -> None:
        super().__init__(str(build()))
        for name in ("stub_seen", "stub_context"):
            getattr(self.lib, name).restype = ctypes.c_uint64
        self.lib.stub_memory.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.living = Living()

    def bind(self, index: int) -> None:
        super().bind(max(index, 0))

    @contextlib.contextmanager
    def watching(self, *tensors):
        """Knows the memory of these and of all that is made inside."""
        self.living.add(tensors)
        with self.living:
            yield

    def launch(self, *args, **kw) -> None:
        self.lib.stub_forget_memory()
        for begin, size in self.living.ranges():
            self._check(self.lib.stub_memory(begin, size), "stub_memory")
        super().launch(*args, **kw)

    def seen(self) -> list[int]:
        """Shared memory asked for; grid, block, shared memory, stream and words of a launch."""
        return [self.lib.stub_seen(i) for i in range(6)]

    @property
    def early(self) -> int:
        """Launches that may overlap with the one before."""
        return self.lib.stub_seen(6)

    @property
    def launches(self) -> int:
        return self.lib.stub_seen(7)

    @property
    def unloaded(self) -> int:
        return self.lib.stub_seen(8)

    @contextlib.contextmanager
    def capture_elsewhere(self):
        """Another thread captures a stream of every context."""
        self.lib.stub_capture(1)
        try:
            yield
        finally:
            self.lib.stub_capture(0)

    @property
    def bound(self) -> bool:
        """Whether this thread has a context."""
        return self.lib.stub_context() != 0
