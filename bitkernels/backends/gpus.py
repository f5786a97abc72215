"""What the backends ask about a GPU, of the one that is there or of one that is only named.

Inside `planning_for("sm_90")` every device counts as such a GPU, so that a machine without one can
say what it would run. Nothing is launched there.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """capability: of CUDA, (9, 0) for sm_90; None for AMD."""

    capability: tuple[int, int] | None
    multiprocessors: int
    name: str

    @property
    def architecture(self) -> str:
        return "hip" if self.capability is None else "sm_{}{}".format(*self.capability)


# Multiprocessors of what most GPUs of an architecture are: A100, A40, L40, H100, B200, RTX 5090.
_TYPICAL = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}
_planned: ContextVar[Gpu | None] = ContextVar("a GPU that is planned for", default=None)


def named(architecture: str) -> Gpu:
    """The typical GPU of an architecture: "sm_90" (or "sm_90a"), "hip".

    Raises ValueError for what is no architecture.
    """
    if architecture == "hip":
        return Gpu(None, 304, "an AMD GPU")
    found = re.fullmatch(r"sm_?(\d+)(\d)a?", architecture if isinstance(architecture, str) else "")
    if found is None:
        raise ValueError("an architecture is 'sm_80', 'sm_90', ... or 'hip', got "
                         f"{architecture!r}")
    capability = int(found[1]), int(found[2])
    name = "sm_{}{}".format(*capability)
    return Gpu(capability, _TYPICAL.get(name, 108), f"an {name}")


@contextlib.contextmanager
def planning_for(gpu: Gpu | None) -> Iterator[None]:
    """Inside, in this thread, all devices are this GPU; None: what they are."""
    token = _planned.set(gpu)
    try:
        yield
    finally:
        _planned.reset(token)


def planned() -> bool:
    """Whether answers are for a GPU that is only named."""
    return _planned.get() is not None


@functools.cache
def _there(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    return Gpu(capability, properties.multi_processor_count, properties.name)


def of(device: torch.device) -> Gpu | None:
    """The GPU behind a device; None for one that is none, which tests emulate a GPU on."""
    gpu = _planned.get()
    if gpu is not None:
        return gpu
    if device.type != "cuda":
        return None
    return _there(torch.cuda.current_device() if device.index is None else device.index)
