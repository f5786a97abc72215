"""A table that forgets what has not been asked for the longest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most `most` entries, beside those that `keep` holds back. Threads may share it."""

    def __init__(self, most: int, keep: Callable[[V], bool] | None = None) -> None:
        self.most, self._keep = most, keep
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: K, value: V) -> None:
        """Adds an entry; the least recent ones go. What goes dies outside the lock."""
        gone = []
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            keep = self._keep
            held = sum(map(keep, self._entries.values())) if keep else 0
            for _ in range(len(self._entries) - held - self.most):
                oldest = next(k for k, v in self._entries.items() if not (keep and keep(v)))
                gone.append(self._entries.pop(oldest))
        del gone

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
