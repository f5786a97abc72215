"""Runs an operator in its Triton kernel, once that has proved itself on this device, or in PyTorch.

The first call of an operator on a device (and of each inner product) runs small cases and compares
them bit for bit with the reference (`backends/trust.py`). What runs instead of a kernel that fails
is the next inner product, in the end the reference. Capture of a CUDA graph needs one call before
it: checking synchronizes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil

import torch

from bitkernels.backends import reference
from bitkernels.backends import triton as package
from bitkernels.backends.triton import configs
from bitkernels.backends.trust import Trust, Usable
from bitkernels.ops._record import OPERATORS as RECORDS

OLDEST = (3, 4)
_FILES = {module.name for module in pkgutil.iter_modules(package.__path__)}
OPERATORS = tuple(name for name, operator in RECORDS.items() if operator.file in _FILES)
PRODUCTS = tuple(name for name, operator in RECORDS.items() if operator.product)


def clear() -> None:
    """Forgets what has been checked; the next calls check again."""
    trust.clear()
    usable.clear()


def why_unusable(device: torch.device) -> str | None:
    """Why no Triton kernel runs on this device, or None."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "triton is not installed"
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            if tuple(int(p) for p in found.split(".")[:2]) < OLDEST:
                return f"triton {found} is older than {'.'.join(map(str, OLDEST))}"
            break
    if configs.family(device) == "old":
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def kernel(op: str):
    """Of the file that is named as the one of the operator's record."""
    module = importlib.import_module(f"bitkernels.backends.triton.{RECORDS[op].file}")
    return getattr(module, op)


def inner_products(op: str, args, kw) -> tuple[str | None, ...]:
    if op not in PRODUCTS:
        return (None,)
    module = importlib.import_module(f"bitkernels.backends.triton.{op}")
    return module.inner_products(*args, **kw)


def run(op: str, *args, **kw):
    device = args[0].device
    if configs.enabled() and _usable(device):
        for inner in inner_products(op, args, kw):
            if not _trusted(op, inner, device):
                continue
            found = trust.run((op, inner), device, _launch, op, *args, **kw,
                              **({"inner": inner} if inner else {}))
            if found is not None:
                return found
    return reference.run(op, *args, **kw)


def _launch(op: str, *args, **kw):
    return kernel(op)(*args, **kw)


def _usable(device: torch.device) -> bool:
    return usable.obstacle(
        device, why_unusable,
        lambda why: f"{why}; on {device} the operators run in plain PyTorch, slowly") is None


def _trusted(op: str, inner: str | None, device: torch.device) -> bool:
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
