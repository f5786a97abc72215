"""The CUDA driver by ctypes: loads machine code and launches it on PyTorch's current stream.

PyTorch owns the context, the memory and the stream; nothing here allocates or synchronizes. Tests
put an emulator in the place of `Driver`.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import ClassVar

from bitkernels.backends.cuda import compiler
from bitkernels.backends.cuda.kernels import Kernel
from bitkernels.backends.cuda.maps import Geometry
from bitkernels.backends.cuda.recent import Recent
from bitkernels.backends.cuda.spec import Spec

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# Values of the enumerations that cuTensorMapEncodeTiled takes: UINT8, UINT32 and UINT64 by the
# bytes of an element, swizzle, promotion.
ELEMENTS = {1: 0, 4: 2, 8: 4}
SWIZZLE_NONE, SWIZZLE_128B, PROMOTE_256B = 0, 3, 3
ENTRY = b"bitkernels_kernel"
MOST_MAPS = 4096
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class TensorMap(ctypes.Structure):
    """CUtensorMap: 128 bytes that the driver fills; it wants them at a multiple of 64."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: a number that says which, and a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int),
                ("rest", ctypes.c_char * 60)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig: grid, block and shared memory; stream; attributes and their number."""

    _fields_ = [("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(LaunchAttribute)), ("count", ctypes.c_uint)]


EARLY = LaunchAttribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class DriverError(RuntimeError):
    pass


class Loaded:
    """A kernel in a module of its own, which is unloaded when nobody holds this any more.

    A CUDA graph holds the function alone: what a graph has captured is kept for ever.
    """

    _kept: ClassVar[set[Loaded]] = set()

    def __init__(self, driver: Driver, module: int, function: int, context: int) -> None:
        self.function, self.captured = function, False
        self._end = weakref.finalize(self, driver.unload, module, context)
        self._end.atexit = False  # the process takes its modules with it

    def keep(self) -> None:
        """Stay loaded: a graph is about to capture a launch."""
        self.captured = True
        self._kept.add(self)


class Driver:
    def __init__(self, library: str = "libcuda.so.1"):
        self.lib = ctypes.CDLL(library)
        self.lib.cuLaunchKernel.argtypes = [
            ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_void_p]
        self.lib.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        # A map holds an address and sizes, nothing of the memory there.
        self._maps: Recent[tuple[int, Geometry], TensorMap] = Recent(MOST_MAPS)

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{what}: {(text.value or b'unknown error').decode()} ({status})")

    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver knows."""
        number = ctypes.c_int()
        self._check(self.lib.cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
        return number.value // 1000, number.value % 1000 // 10

    def bind(self, index: int) -> None:
        """Makes PyTorch's context current in a thread that has none, as in a fresh one."""
        current = ctypes.c_void_p()
        self._check(self.lib.cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
        if not current.value:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._check(self.lib.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
            self._check(self.lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
                        "cuDevicePrimaryCtxRetain")
            self._check(self.lib.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def build(self, kernel: Kernel, spec: Spec, arch: str) -> Loaded:
        """The kernel compiled for a shape and loaded in the current context."""
        source = kernel.source, spec.header(), arch
        context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.lib.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        for renew in (False, True):  # the cache may have what this driver does not load
            binary = compiler.compile(*source, renew=renew)
            with self._beside_captures():
                status = self.lib.cuModuleLoadData(ctypes.byref(module), binary.code)
            if not status or binary.log:
                break
        self._check(status, "cuModuleLoadData")
        assert context.value is not None and module.value is not None
        self._check(self.lib.cuModuleGetFunction(ctypes.byref(function), module, ENTRY),
                    "cuModuleGetFunction")
        shared = kernel.shared_bytes(spec)
        if shared:
            self._check(self.lib.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared),
                        f"{shared} bytes of shared memory")
        assert function.value is not None
        return Loaded(self, module.value, function.value, context.value)

    def unload(self, module: int, context: int) -> None:
        """Takes a module out of its context, from any thread, once what was launched of it has run.

        Where the context cannot be waited for (it is broken, or another thread captures a graph in
        it) the module stays.
        """
        with contextlib.suppress(DriverError), self._beside_captures():
            self._check(self.lib.cuCtxPushCurrent_v2(ctypes.c_void_p(context)), "cuCtxPushCurrent")
            try:
                self._check(self.lib.cuCtxSynchronize(), "cuCtxSynchronize")
                self._check(self.lib.cuModuleUnload(ctypes.c_void_p(module)), "cuModuleUnload")
            finally:
                self.lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    @contextlib.contextmanager
    def _beside_captures(self) -> Iterator[None]:
        """Inside, this thread's calls do not end captures of other threads."""
        mode = ctypes.c_int(RELAXED)
        exchange = self.lib.cuThreadExchangeStreamCaptureMode
        self._check(exchange(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
        try:
            yield
        finally:
            exchange(ctypes.byref(mode))

    def tensor_map(self, address: int, geometry: Geometry) -> TensorMap:
        """Of a tensor at this address."""
        key = address, geometry
        found = self._maps.get(key)
        if found is None:
            found = self._encoded(address, geometry)
            self._maps.put(key, found)
        return found

    def _encoded(self, address: int, geometry: Geometry) -> TensorMap:
        space = (ctypes.c_uint8 * 192)()
        start = -ctypes.addressof(space) % 64
        u32, u64, rank = ctypes.c_uint32, ctypes.c_uint64, len(geometry.sizes)
        self._check(self.lib.cuTensorMapEncodeTiled(
            ctypes.c_void_p(ctypes.addressof(space) + start), ELEMENTS[geometry.element], rank,
            ctypes.c_void_p(address), (u64 * rank)(*geometry.sizes),
            (u64 * 4)(*geometry.strides), (u32 * rank)(*geometry.box), (u32 * rank)(*[1] * rank),
            0, SWIZZLE_128B if geometry.swizzled else SWIZZLE_NONE, PROMOTE_256B, 0),
            f"cuTensorMapEncodeTiled of {geometry} at {address:#x}")
        map = TensorMap()
        ctypes.memmove(ctypes.addressof(map), ctypes.addressof(space) + start, 128)
        return map

    def launch(self, kernel: Loaded, grid: int, block: int, shared: int, stream: int,
               *params: ctypes.Structure, early: bool = False) -> None:
        """early: it may start before the kernel that was launched just before has ended, as soon as
        all blocks of that one have said so, and waits for its results itself."""
        pointers = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, params))
        if early:
            config = LaunchConfig((ctypes.c_uint * 7)(grid, 1, 1, block, 1, 1, shared), stream,
                                  ctypes.pointer(EARLY), 1)
            self._check(self.lib.cuLaunchKernelEx(ctypes.byref(config), kernel.function, pointers,
                                                  None), "cuLaunchKernelEx")
        else:
            self._check(self.lib.cuLaunchKernel(kernel.function, grid, 1, 1, block, 1, 1, shared,
                                                stream, pointers, None), "cuLaunchKernel")
