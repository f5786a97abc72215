"""Sources to machine code by NVRTC, kept on disk under the hash of all that made it.

A cached file ends with the hash of what it holds; one that was cut or changed counts as absent and
is written anew. Processes which compile at the same time do not see half a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bitkernels._files import mark_of_this_writer, replace_file
from bitkernels.backends.cuda import nvrtc

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
def version() -> tuple[int, int]:
    """Of NVRTC; raises OSError where there is none."""
    return nvrtc.version()


@functools.cache
def architectures() -> frozenset[int]:
    return nvrtc.architectures()


def cache_folder() -> Path | None:
    """Where machine code is kept, or None where no folder is this user's alone."""
    chosen = os.environ.get("BITKERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "bitkernels" / "cuda"
    try:
        return Path.home() / ".cache" / "bitkernels" / "cuda"
    except RuntimeError:  # a user without an entry in passwd, as containers have
        return _temporary_folder()


def _temporary_folder() -> Path | None:
    """One that nobody else could have made or may write to, since its code is run."""
    if not hasattr(os, "getuid"):
        return None
    folder = Path(tempfile.gettempdir()) / f"bitkernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if own and not found.st_mode & 0o077 else None


def compile(source: str, header: str, arch: str, *, cached: bool = True,
            renew: bool = False) -> Binary:
    """Machine code of `source` with `header` as spec.cuh, for 'sm_80', 'sm_90a', ...

    cached: whether the cache takes part; renew: compile, and replace what it has.
    """
    parts = (source, header, arch, *OPTIONS, str(version()), *(f"{k}\0{v}" for k, v in
                                                              sources().items()))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    folder = cache_folder() if cached else None
    path = None if folder is None else folder / f"{key}.cubin"
    if path is not None and not renew:
        code = _read(path)
        if code is not None:
            return Binary(code, "")
    binary = _compile(source, header, arch)
    if path is not None:
        with contextlib.suppress(OSError):  # a full or read-only disk costs time only
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, binary.code + _digest(binary.code), mark_of_this_writer())
    return binary


def _digest(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def _read(path: Path) -> bytes | None:
    """What was written there, or None: nothing, or not all of it."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    size = len(data) - hashlib.sha256().digest_size
    code = data[:max(size, 0)]
    return code if code and data[size:] == _digest(code) else None


def _compile(source: str, header: str, arch: str) -> Binary:
    try:
        return Binary(*nvrtc.compile(source, {**sources(), "spec.cuh": header},
                                     (f"--gpu-architecture={arch}", *OPTIONS)))
    except nvrtc.NvrtcError as error:
        raise CompileError(f"{arch}: {error}") from None
