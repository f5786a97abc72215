"""NVRTC through CuPy: sources to machine code, kept on disk under the hash of all that made it.

Needs no GPU, no nvcc and no CUDA headers. A cached file is written under another name first and
then renamed, so that processes which compile at the same time do not see half a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v", "--diag-suppress=128")


class CompileError(RuntimeError):
    pass


@dataclass(frozen=True)
class Binary:
    code: bytes  # a cubin
    log: str  # what ptxas said of registers and spills; empty if it came from the cache


def source_folder() -> Path:
    """csrc/cuda: inside the package where that is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent / "csrc"
    if package.is_dir():
        return package
    return Path(__file__).resolve().parents[3] / "csrc" / "cuda"


@functools.cache
def sources() -> dict[str, str]:
    """The headers by name."""
    found = {path.name: path.read_text() for path in sorted(source_folder().glob("*.cuh"))}
    if not found:
        raise CompileError(f"no CUDA sources in {source_folder()}")
    return found


@functools.cache
def nvrtc():
    """CuPy's binding; raises ImportError, or OSError without the library itself."""
    from cupy_backends.cuda.libs import nvrtc as binding

    binding.getVersion()
    return binding


def version() -> tuple[int, int]:
    return nvrtc().getVersion()


@functools.cache
def architectures() -> frozenset[int]:
    """Compute capabilities that this NVRTC compiles for, as 80, 89, 90."""
    return frozenset(nvrtc().getSupportedArchs())


def cache_folder() -> Path:
    chosen = os.environ.get("BITKERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitkernels" / "cuda"


def compile(source: str, header: str, arch: str, *, cached: bool = True) -> Binary:
    """Machine code of `source` with `header` as spec.cuh, for 'sm_80', 'sm_90a', ..."""
    parts = (source, header, arch, *OPTIONS, str(version()), *(f"{k}\0{v}" for k, v in
                                                              sources().items()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if cached:
        with contextlib.suppress(OSError):
            return Binary(path.read_bytes(), "")
    binary = _compile(source, header, arch)
    if cached:
        with contextlib.suppress(OSError):  # a full or read-only disk costs time only
            _write(path, binary.code)
    return binary


def _compile(source: str, header: str, arch: str) -> Binary:
    binding = nvrtc()
    headers = {**sources(), "spec.cuh": header}
    program = binding.createProgram(source, "bitkernels.cu", [t.encode() for t in headers.values()],
                                    [name.encode() for name in headers])
    try:
        binding.compileProgram(program, (f"--gpu-architecture={arch}", *OPTIONS))
        # CuPy 14 cuts the last byte, as if it ended a string; it is 0, and one more harms nothing.
        return Binary(binding.getCUBIN(program) + b"\0", binding.getProgramLog(program))
    except binding.NVRTCError as error:
        raise CompileError(f"{error} for {arch}:\n{binding.getProgramLog(program)}") from None
    finally:
        binding.destroyProgram(program)


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
