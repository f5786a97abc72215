"""The CUDA driver by ctypes: loads machine code and launches it on PyTorch's current stream.

PyTorch owns the context, the memory and the stream; nothing here allocates or synchronizes. Tests
put an emulator in the place of `Driver`.
"""

from __future__ import annotations

import ctypes

from bitkernels.backends.cuda import compiler
from bitkernels.backends.cuda.kernels import Kernel
from bitkernels.backends.cuda.spec import Spec

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# Values of the enumerations that cuTensorMapEncodeTiled takes: element type, swizzle, promotion.
UINT8, SWIZZLE_128B, PROMOTE_256B = 0, 3, 3
ENTRY = b"bitkernels_kernel"


class TensorMap(ctypes.Structure):
    """CUtensorMap: 128 bytes that the driver fills; it wants them at a multiple of 64."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class DriverError(RuntimeError):
    pass


class Driver:
    def __init__(self, library: str = "libcuda.so.1"):
        self.lib = ctypes.CDLL(library)
        self.lib.cuLaunchKernel.argtypes = [
            ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_void_p]

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

    def build(self, kernel: Kernel, spec: Spec, arch: str) -> int:
        """A handle of the kernel compiled for a shape and loaded in the current context."""
        source = kernel.source, spec.header(), arch
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        for renew in (False, True):  # the cache may have what this driver does not load
            binary = compiler.compile(*source, renew=renew)
            status = self.lib.cuModuleLoadData(ctypes.byref(module), binary.code)
            if not status or binary.log:
                break
        self._check(status, "cuModuleLoadData")
        self._check(self.lib.cuModuleGetFunction(ctypes.byref(function), module, ENTRY),
                    "cuModuleGetFunction")
        shared = kernel.shared_bytes(spec)
        if shared:
            self._check(self.lib.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared),
                        f"{shared} bytes of shared memory")
        assert function.value is not None
        return function.value

    def tensor_map(self, tensor, rows: int, width: int, box: int) -> TensorMap:
        """Boxes of `box` rows by 128 bytes of a (rows, width bytes) matrix, swizzled by 128 bytes
        and filled up with zeros."""
        space = (ctypes.c_uint8 * 192)()
        start = -ctypes.addressof(space) % 64
        u32, u64 = ctypes.c_uint32, ctypes.c_uint64
        self._check(self.lib.cuTensorMapEncodeTiled(
            ctypes.c_void_p(ctypes.addressof(space) + start), UINT8, 2,
            ctypes.c_void_p(tensor.data_ptr()), (u64 * 2)(width, rows), (u64 * 1)(width),
            (u32 * 2)(128, box), (u32 * 2)(1, 1), 0, SWIZZLE_128B, PROMOTE_256B, 0),
            "cuTensorMapEncodeTiled")
        map = TensorMap()
        ctypes.memmove(ctypes.addressof(map), ctypes.addressof(space) + start, 128)
        return map

    def launch(self, function: int, grid: int, block: int, shared: int, stream: int,
               *params: ctypes.Structure) -> None:
        pointers = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, params))
        self._check(self.lib.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream,
                                            pointers, None), "cuLaunchKernel")
