"""Tensors that the kernel before is not writing: what a launch may read before that one has ended.

On Hopper a kernel may start while the one before it on its stream ends, and waits for it before it
reads what that one may have written. Filters that an earlier call has read, and that are as they
were, were written before that call: a layer's weights are copied while the layer before still runs.

A tensor is known by its storage, with a weak reference, so that nothing else gets its place, and by
its version, which every change in place counts, but for changes through `.data`, by other names of
the memory (DLPack, pointers) and of inference tensors, which are never settled. Those are kernels
of others, which let no kernel start before they have ended.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

MOST = 1024

_lock = threading.Lock()
_seen: dict[int, tuple[StorageWeakRef, int]] = {}


class _Here(threading.local):
    answer: bool | None = None


_here = _Here()


@contextlib.contextmanager
def answering(answer: bool) -> Iterator[None]:
    """Inside, `has` says so in this thread, whatever is known and other threads add."""
    before, _here.answer = _here.answer, answer
    try:
        yield
    finally:
        _here.answer = before


def has(t: Tensor) -> bool:
    """Whether a call before has read it as it is."""
    if _here.answer is not None:
        return _here.answer
    if not _known(t):
        return False
    found = _seen.get(t.untyped_storage()._cdata)
    return found is not None and found[1] == t._version


def add(t: Tensor) -> None:
    """A call has read it."""
    if not _known(t):
        return
    storage = t.untyped_storage()
    kept = StorageWeakRef(storage), t._version
    with _lock:
        if len(_seen) >= MOST:
            _seen.clear()
        _seen[storage._cdata] = kept


def _known(t: Tensor) -> bool:
    """Whether it has a storage and a version."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_inference()


def clear() -> None:
    """Forgets all."""
    with _lock:
        _seen.clear()
