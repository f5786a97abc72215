"""Whether a compiled kernel may run on a device: it proves itself once, by small cases.

A kernel that differs from the reference, or does not compile, is named in one warning and not used
again in this process. What is not the kernel's fault leaves it its trust: lack of memory, a capture
that cannot go on, a device that an earlier error has broken. Those errors reach the caller. Any
other error of a launch is tried once more before the kernel is blamed.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

from bitkernels.backends.gpus import planned


class Capturing(RuntimeError):
    """A kernel is not loaded yet and the stream is being captured."""


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, where it is not yet."""
    return contextlib.nullcontext() if is_current(device) else torch.cuda.device(device)


def is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def index(device: torch.device) -> int:
    return -1 if device.index is None else device.index


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(op: str, device: torch.device) -> None:
    if capturing(device):
        raise RuntimeError(f"bitkernels::{op}: the first call on {device} checks the kernel and "
                           "cannot be captured; call it once before the capture")


def not_the_kernels(error: Exception, device: torch.device) -> Exception | None:
    """What to raise for an error that says nothing of the kernel that met it, else None."""
    if isinstance(error, (torch.OutOfMemoryError, Capturing)):
        return error
    # Triton and the driver have no type of their own for it.
    if "out of memory" in str(error).lower().replace("_", " "):
        return torch.OutOfMemoryError(str(error))
    if device.type != "cuda":
        return None
    try:
        if capturing(device):
            return error
        torch.cuda.synchronize(device)
    except RuntimeError:  # an error of another kernel, which every later call meets
        return error
    return None


class Trust:
    """What is known of the kernels of one backend. A key names a kernel: (operator, which one).

    warning: of a key, the device and what went wrong: the words of the warning.
    """

    def __init__(self, warning: Callable[[Any, torch.device, str], str]) -> None:
        self._warning = warning
        self._lock = threading.RLock()
        self._verdicts: dict[tuple[Hashable, int], str | None] = {}
        self._checking: set[tuple[Hashable, int]] = set()  # read by the thread with the lock

    def clear(self) -> None:
        """Forgets what has been checked; the next calls check again."""
        with self._lock:
            self._verdicts.clear()

    def state(self, key: Hashable, device: torch.device) -> tuple[bool, str]:
        """Whether the next call would try the kernel, and what is known; asks nothing of it."""
        place = key, index(device)
        if place not in self._verdicts or planned():
            return True, "not checked yet"
        wrong = self._verdicts[place]
        return wrong is None, "checked" if wrong is None else wrong

    def passed(self, key: Hashable, device: torch.device) -> bool:
        """Whether the kernel has been checked and may run: most answers of `has`, sooner."""
        return self._verdicts.get((key, index(device)), "") is None

    def has(self, key: Any, device: torch.device, failure: Callable[[], str | None]) -> bool:
        """Whether the kernel may run. The first question asks `failure`, on the device; other
        threads wait for the answer.

        Raises RuntimeError for a first call in a capture, and what is not the kernel's fault.
        """
        place = key, index(device)
        with self._lock:
            if place not in self._verdicts:
                if place in self._checking:  # by this thread: the check itself runs the kernel
                    return True
                refuse_capture(key[0], device)
                self._check(key, device, failure)
            return self._verdicts[place] is None

    def _check(self, key, device, failure) -> None:
        place = key, index(device)
        self._checking.add(place)
        try:
            with on(device):
                found = failure()
        except Exception as error:
            instead = not_the_kernels(error, device)
            if instead is not None:
                raise instead from error
            found = f"failed: {type(error).__name__}: {error}"
        finally:
            self._checking.remove(place)
        if found is None:
            self._verdicts.setdefault(place, None)  # it may have been withdrawn by a launch
        else:
            self.withdraw(key, device, found)

    def withdraw(self, key: Hashable, device: torch.device, what: str) -> None:
        """The kernel runs no more; one warning says so."""
        with self._lock:
            self._verdicts[key, index(device)] = what
        warnings.warn("bitkernels: " + self._warning(key, device, what), stacklevel=2)

    def run(self, key: Hashable, device: torch.device, call: Callable, /, *args, **kw) -> Any:
        """What the kernel returns, or None if it fails twice and is trusted no more."""
        for attempt in (1, 2):
            try:
                if is_current(device):
                    return call(*args, **kw)
                with on(device):
                    return call(*args, **kw)
            except Exception as error:
                instead = not_the_kernels(error, device)
                if instead is not None:
                    raise instead from (None if instead is error else error)
                if attempt == 2:
                    self.withdraw(key, device, f"failed: {type(error).__name__}: {error}")
        return None


class Usable:
    """Why a backend does not run on a device, asked once for each."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._reasons: dict[int, str | None] = {}
        self._said: set[int] = set()

    def clear(self) -> None:
        with self._lock:
            self._reasons.clear()
            self._said.clear()

    def runs(self, device: torch.device) -> bool:
        """Whether it is known that the backend runs here, for calls, which ask every time."""
        return self._reasons.get(index(device), "") is None and not planned()

    def reason(self, device: torch.device, why_unusable: Callable[[torch.device], str | None]
               ) -> str | None:
        """Why not, None where it runs. Of a GPU that is only named nothing is kept."""
        if planned():
            return why_unusable(device)
        with self._lock:
            if index(device) not in self._reasons:
                self._reasons[index(device)] = why_unusable(device)
            return self._reasons[index(device)]

    def obstacle(self, device: torch.device, why_unusable: Callable[[torch.device], str | None],
                 warning: Callable[[str], str | None]) -> str | None:
        """`reason`, which a call meets. `warning` makes its words, said the first time."""
        reason = self.reason(device, why_unusable)
        if reason is not None and index(device) not in self._said:
            self._said.add(index(device))
            said = warning(reason)
            if said is not None:
                warnings.warn(f"bitkernels: {said}", stacklevel=3)
        return reason
