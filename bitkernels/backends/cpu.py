"""The C++ CPU engine: loads the extension, which registers its kernels for CPU tensors.

`BITKERNELS_CPU` forces one of `kernels()`, or `reference` to run without the extension.
"""

from __future__ import annotations

import importlib
import os
import time

import torch

REFERENCE = "reference"


def _load() -> str | None:
    """None where the extension is loaded, else why not."""
    if os.environ.get("BITKERNELS_CPU") == REFERENCE:
        return "BITKERNELS_CPU=reference"
    try:
        importlib.import_module("bitkernels._C")
    except ModuleNotFoundError:
        return "the extension bitkernels._C is not built"
    except ImportError as error:
        return f"the extension bitkernels._C does not load: {error}"
    return None


why_not = _load()


def kernels() -> list[tuple[str, bool]]:
    """(name, whether this machine supports it) of every compiled kernel, best first."""
    if why_not:
        return []
    lines = torch.ops.bitkernels._cpu_kernels().splitlines()
    return [(name, flag == "1") for name, flag in (line.split() for line in lines)]


def active() -> str | None:
    """The kernel in use, None without the extension. Raises if BITKERNELS_CPU names no kernel."""
    return None if why_not else torch.ops.bitkernels._cpu_active()


def popcount_ceiling(seconds: float = 0.1) -> float:
    """Products per second of one core in a register-only xor + popcount + add loop."""
    loop, best, end = torch.ops.bitkernels._cpu_popcount_loop, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        products = loop(100_000)
        best = max(best, products / (time.perf_counter() - start))
    return best


def explain() -> str:
    """One line: what runs on CPU tensors, and why."""
    if why_not:
        return f"reference (slow, plain PyTorch): {why_not}"
    forced = os.environ.get("BITKERNELS_CPU")
    reason = f"BITKERNELS_CPU={forced}" if forced else "the best this machine supports"
    return f"{active()}: {reason}"
