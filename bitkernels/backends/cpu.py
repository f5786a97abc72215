"""The C++ CPU engine: loads the extension, which registers its kernels for CPU tensors.

`BITKERNELS_CPU` forces one of `kernels()`, or `reference` to run without the extension.
"""

from __future__ import annotations

import functools
import importlib
import os
import sysconfig
import time
import warnings
from pathlib import Path

import torch

from bitkernels.backends.answer import Answer, registered
from bitkernels.ops._record import OPERATORS as RECORDS

REFERENCE = "reference"
# That the commands set, as bk_set_threads; OpenMP ends the process where the system has too few.
MOST_THREADS = 1024
# setup.py builds no engine there.
NO_ENGINE = os.name == "nt" or bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
OPERATORS = tuple(name for name, operator in RECORDS.items() if operator.engine)


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


def remedy() -> str:
    """What gives an installation its engine."""
    if NO_ENGINE:
        return "It is not made for this platform"
    source = Path(__file__).resolve().parents[2]
    if (source / "setup.py").exists():
        return (f"{source} is the source, which hides an installed copy from Python started there: "
                "leave it, or build in it by pip install --no-build-isolation -e .")
    return "Install bitkernels again with a C++ compiler"


@functools.cache
def warn_slow() -> None:
    """Says once a process why an operator runs in plain PyTorch on a CPU.

    Silent where that was asked for: BITKERNELS_CPU=reference, BITKERNELS_NO_EXT.
    """
    if os.environ.get("BITKERNELS_CPU") == REFERENCE or (
            os.environ.get("BITKERNELS_NO_EXT", "0") != "0"):
        return
    missing = [name for name in OPERATORS if not registered(name, "CPU")]
    if why_not:
        warnings.warn(f"bitkernels runs slowly on CPUs: {why_not}. {remedy()}. BITKERNELS_CPU="
                      "reference asks for this and keeps it quiet.", stacklevel=2)
    elif missing:
        warnings.warn("bitkernels._C is older than the Python files: build it again. Until then "
                      f"these operators run slowly on CPUs: {', '.join(missing)}", stacklevel=2)


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
    """Products per second of one core in registers alone, by the instructions of the kernel."""
    loop, best, end = torch.ops.bitkernels._cpu_popcount_loop, 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        products = loop(100_000)
        best = max(best, products / (time.perf_counter() - start))
    return best


def explain(op: str | None = None, *args, **kw) -> Answer:
    """Which kernel a call on CPU tensors runs, and why; without `op` one of any operator.

    Raises RuntimeError if BITKERNELS_CPU names no kernel of this machine.
    """
    if why_not:
        return Answer("cpu", None, why_not)
    if op is not None and not registered(op, "CPU"):
        return Answer("cpu", None, "bitkernels._C is older than the Python files" if op in OPERATORS
                      else f"the engine has no kernel of {op}")
    forced = os.environ.get("BITKERNELS_CPU")
    return Answer("cpu", active(), f"BITKERNELS_CPU={forced}" if forced
                  else "the best this machine supports")


def summary() -> str:
    """One line: what runs on CPU tensors, and why."""
    found = explain()
    if found.kernel is None:
        return f"reference (slow, plain PyTorch): {found.reason}"
    return f"{found.kernel}: {found.reason}"
