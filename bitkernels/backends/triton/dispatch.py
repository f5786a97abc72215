"""Runs an operator in its Triton kernel, once that has proved itself on this device, or in PyTorch.

The first call of an operator on a device (and of each inner product) runs small cases and compares
them bit for bit with the reference (`backends/trust.py`). What runs instead of a kernel that fails
is the next inner product, in the end the reference. Capture of a CUDA graph needs one call before
it: checking synchronizes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import pkgutil
from typing import cast

import torch

from bitkernels.backends import gpus, reference, replay
from bitkernels.backends import triton as package
from bitkernels.backends.answer import Answer
from bitkernels.backends.triton import configs, plan
from bitkernels.backends.trust import Trust, Usable, is_current
from bitkernels.ops._record import OPERATORS as RECORDS

OLDEST = (3, 4)
_FILES = {module.name for module in pkgutil.iter_modules(package.__path__)}
OPERATORS = tuple(name for name, operator in RECORDS.items() if operator.file in _FILES)
PRODUCTS = tuple(name for name, operator in RECORDS.items() if operator.product)


# Operators with one kernel, by device, once it has run there: usable and trusted.
_ready: set[tuple[str, torch.device]] = set()


def clear() -> None:
    """Forgets what has been checked; the next calls check again."""
    _ready.clear()
    kernel.cache_clear()
    replay.clear()
    trust.clear()
    usable.clear()


def why_unusable(device: torch.device) -> str | None:
    """Why no Triton kernel runs on this device, or None."""
    if configs.family(device) == "old":
        return f"{cast(gpus.Gpu, gpus.of(device)).name} is older than sm_80"
    if gpus.planned():
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            if tuple(int(p) for p in found.split(".")[:2]) < OLDEST:
                return f"triton {found} is older than {'.'.join(map(str, OLDEST))}"
            break
    return None


@functools.cache
def kernel(op: str):
    """Of the file that is named as the one of the operator's record."""
    module = importlib.import_module(f"bitkernels.backends.triton.{RECORDS[op].file}")
    return getattr(module, op)


def run(op: str, *args, **kw):
    device = args[0].device
    if (op, device) in _ready and plan.takes(op, args, kw) and is_current(device):
        try:
            return _launch(op, *args, **kw)
        except Exception:  # below it is tried again, and its kernel blamed
            _ready.discard((op, device))
    inners = plan.decide(op, args, kw, device).inners
    if inners and _usable(device):
        for inner in inners:
            if not _trusted(op, inner, device):
                continue
            if inner is not None:
                kw["inner"] = inner
            found = trust.run((op, inner), device, _launch, op, *args, **kw)
            if found is not None:
                if inner is None:
                    _ready.add((op, device))
                return found
    kw.pop("inner", None)
    return reference.run(op, *args, **kw)


def explain(op: str, *args, **kw) -> Answer:
    """Which kernel a call with checked arguments would run, and why; runs and checks nothing."""
    device = args[0].device
    found = plan.decide(op, args, kw, device)
    reason = usable.reason(device, why_unusable) if found.inners else None
    if reason is not None:
        return Answer("triton", None, reason)
    wrong = ""
    for inner in found.inners:
        tried, known = trust.state((op, inner), device)
        if tried:
            tiles = _tiles(inner, found.size, device)
            name = f"{inner or op} {tiles[0]}" if len(tiles) == 1 else inner or op
            timed = f"; the fastest of {len(tiles)} tiles, timed once" if len(tiles) > 1 else ""
            return Answer("triton", name, f"{wrong}{found.reason}{timed}", wrong + known)
        wrong += f"{inner or op} {known}; "
    return Answer("triton", None, wrong.removesuffix("; ") or found.reason)


def _tiles(inner: str | None, size: configs.Size | None, device: torch.device) -> list[str]:
    """Rows x columns of a product's tile, or of those that tuning chooses among."""
    if inner is None or size is None:
        return []
    family = configs.family(device)
    if configs.tunes(size):
        return [str(tile) for tile in configs.table(inner, family, size.flat)]
    return [str(configs.fixed_tile(inner, family, size))]


def _launch(op: str, *args, **kw):
    return kernel(op)(*args, **kw)


def _usable(device: torch.device) -> bool:
    if usable.runs(device):
        return True
    return usable.obstacle(
        device, why_unusable,
        lambda why: f"{why}; on {device} the operators run in plain PyTorch, slowly") is None


def _trusted(op: str, inner: str | None, device: torch.device) -> bool:
    if trust.passed((op, inner), device):
        return True

    def failure() -> str | None:
        from bitkernels.backends.triton import selfcheck

        return selfcheck.failure(op, inner, device)

    return trust.has((op, inner), device, failure)


def _warning(key: tuple[str, str | None], device: torch.device, what: str) -> str:
    op, inner = key
    name = op if inner is None else f"{op} ({inner})"
    instead = "the reference" if inner in (None, "popc") else "the next inner product"
    return f"the Triton kernel of {name} on {device} {what}; {instead} runs instead"


trust, usable = Trust(_warning), Usable()
