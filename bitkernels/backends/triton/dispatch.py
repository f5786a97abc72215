"""Runs an operator in its Triton kernel, once that has proved itself on this device, or in PyTorch.

The first call of an operator on a device (and of each inner product) runs small cases and compares
them bit for bit with the reference. A kernel which differs, or does not compile, is named in one
warning and never used again in this process; what runs instead is the next inner product, in the
end the reference. Capture of a CUDA graph needs one call before it: checking synchronizes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
import warnings

import torch

from bitkernels.backends import reference
from bitkernels.backends.triton import configs

OLDEST = (3, 4)
MODULES = {  # where not its own name
    "sign_pack_mask": "sign_pack",
    "rprelu_backward": "rprelu",
    "residual_block_forward": "residual_block",
    "residual_block_backward": "residual_block",
    "residual_block_norm_backward": "residual_block",
}
PRODUCTS = ("packed_conv2d", "packed_conv2d_moments", "packed_linear")

_lock = threading.RLock()
_trust: dict[tuple[str, str | None, int], bool] = {}
_unusable: dict[int, str | None] = {}


def clear() -> None:
    """Forgets what has been checked; the next calls check again."""
    with _lock:
        _trust.clear()
        _unusable.clear()


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
    module = importlib.import_module(f"bitkernels.backends.triton.{MODULES.get(op, op)}")
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
            try:
                with _on(device):
                    return kernel(op)(*args, **kw, **({"inner": inner} if inner else {}))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton raises many types for one that does not compile
                _distrust(op, inner, device, f"failed: {type(error).__name__}: {error}")
    return reference.run(op, *args, **kw)


def _on(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _index(device: torch.device) -> int:
    return -1 if device.index is None else device.index


def _usable(device: torch.device) -> bool:
    with _lock:
        if _index(device) not in _unusable:
            reason = _unusable[_index(device)] = why_unusable(device)
            if reason is not None:
                warnings.warn(f"bitkernels: {reason}; on {device} the operators run in plain "
                              "PyTorch, slowly", stacklevel=2)
        return _unusable[_index(device)] is None


def _trusted(op: str, inner: str | None, device: torch.device) -> bool:
    key = (op, inner, _index(device))
    with _lock:
        if key not in _trust:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"bitkernels::{op}: the first call on {device} checks the "
                                   "kernel and cannot be captured; call it once before the capture")
            from bitkernels.backends.triton import selfcheck

            _trust[key] = True
            try:
                with _on(device):
                    failure = selfcheck.failure(op, inner, device)
            except Exception as error:
                failure = f"failed: {type(error).__name__}: {error}"
            if failure is not None:
                _distrust(op, inner, device, failure)
        return _trust[key]


def _distrust(op: str, inner: str | None, device: torch.device, what: str) -> None:
    with _lock:
        _trust[op, inner, _index(device)] = False
    name = op if inner is None else f"{op} ({inner})"
    instead = "the reference" if inner in (None, "popc") else "the next inner product"
    warnings.warn(f"bitkernels: the Triton kernel of {name} on {device} {what}; {instead} runs "
                  "instead", stacklevel=2)
