"""NVRTC by ctypes: CUDA C++ to machine code, without a GPU, nvcc or CUDA headers.

The library is the one that PyTorch's CUDA wheels install (nvidia-cuda-nvrtc), or a CUDA toolkit's;
cuda-pathfinder, which comes with those wheels and with CuPy, knows the places.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence

MAJORS = (13, 12)  # of CUDA, newest first


class NvrtcError(RuntimeError):
    pass


@functools.cache
def library() -> ctypes.CDLL:
    """libnvrtc; raises OSError where there is none, or none that loads."""
    lib = _found()
    lib.nvrtcGetErrorString.restype = ctypes.c_char_p
    handle = ctypes.c_void_p
    lib.nvrtcCompileProgram.argtypes = [handle, ctypes.c_int, handle]
    for what in ("CUBIN", "ProgramLog"):
        for name in (f"nvrtcGet{what}Size", f"nvrtcGet{what}"):
            getattr(lib, name).argtypes = [handle, handle]
    return lib


def _found() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        pass
    else:
        with contextlib.suppress(RuntimeError):  # it knows none
            return ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    for major in MAJORS:  # where the loader looks
        with contextlib.suppress(OSError):
            return ctypes.CDLL(f"libnvrtc.so.{major}")
    raise OSError("there is no libnvrtc.so." + " or .".join(map(str, MAJORS)))


def _call(name: str, *args) -> None:
    lib = library()
    status = getattr(lib, f"nvrtc{name}")(*args)
    if status:
        raise NvrtcError(f"nvrtc{name}: {lib.nvrtcGetErrorString(status).decode()}")


def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("Version", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def architectures() -> frozenset[int]:
    """Compute capabilities that this NVRTC compiles for, as 80, 89, 90."""
    count = ctypes.c_int()
    _call("GetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call("GetSupportedArchs", found)
    return frozenset(found)


def compile(source: str, headers: Mapping[str, str], options: Sequence[str]) -> tuple[bytes, str]:
    """(a cubin, the log) of a source that includes headers by name; NvrtcError, which ends with the
    log, where it does not compile."""
    with _program(source, headers) as program:
        try:
            _call("CompileProgram", program, len(options), _strings(options))
        except NvrtcError as error:
            raise NvrtcError(f"{error}:\n{_text(program)}") from None
        return _bytes(program, "CUBIN"), _text(program)


@contextlib.contextmanager
def _program(source: str, headers: Mapping[str, str]) -> Iterator[ctypes.c_void_p]:
    program = ctypes.c_void_p()
    _call("CreateProgram", ctypes.byref(program), source.encode(), b"bitkernels.cu", len(headers),
          _strings(list(headers.values())), _strings(list(headers)))
    try:
        yield program
    finally:
        _call("DestroyProgram", ctypes.byref(program))


def _strings(values: Sequence[str]):
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"Get{what}Size", program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    _call(f"Get{what}", program, data)
    return data.raw


def _text(program: ctypes.c_void_p) -> str:
    return _bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
