"""Files that are either the old one or the new one, and depend on nothing but what is in them.

A file is written beside its place under another name, flushed to the disk and then renamed over the
old one: a crash at any moment, or a full disk, leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def safetensors_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of CPU tensors, the same bytes for the same values and metadata.

    The library writes metadata in the order of a hash table, another one in each call. Raises
    ImportError without safetensors, and its errors for tensors that the format does not have.
    """
    import safetensors.torch

    data = safetensors.torch.save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length:]


def mark_of_this_writer() -> str:
    """For `replace_file`: no other thread or process that writes the same file has it."""
    return f".{os.getpid()}.{threading.get_ident()}"


def replace_file(path: Path, data: bytes, mark: str = "") -> None:
    """Put `data` at `path`, all of it or none.

    A file that was there leaves its permissions to the new one; a link is replaced, not followed.

    mark: told apart by it, several writers may replace one file at the same time. Without it a
    later writer takes over the temporary file of one that was killed.

    Raises OSError where the disk is full, the folder cannot be written, or `path` is a device, a
    pipe or a socket; what was at `path` before is then still there, and no other file is left.
    """
    old = path.stat() if path.exists() else None
    if old is not None and not (stat.S_ISREG(old.st_mode) or stat.S_ISDIR(old.st_mode)):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket", os.fspath(path))
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        if old is not None and stat.S_ISREG(old.st_mode) and not path.is_symlink():
            temporary.chmod(stat.S_IMODE(old.st_mode))
        put(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def put(temporary: Path, path: Path) -> None:
    """Rename a file in the same folder to `path`, with all its bytes on the disk before.

    Raises OSError.
    """
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes, and other calls in this one, out of a folder that is there.

    The system lets go of it when the process ends, however it ends. Raises BlockingIOError where
    another holds it, OSError where the folder cannot be written. Systems and file systems without
    flock lock nothing.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # no locks here
            pass
        yield
