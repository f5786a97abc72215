"""Picks csrc/cuda or the next backend for a call, and says why.

Environment, read at call time:
  BITKERNELS_CUDA         1: any kernel that takes the call; 0: none. Unset: only what plan.py
                          has measurements of, near the call and faster than the next backend
  BITKERNELS_CUDA_KERNEL  the name of one kernel to run wherever it fits (for measuring)

The first use of a kernel on a device runs small cases and compares them bit for bit with the
reference. A kernel that differs, or does not compile or load, is named in one warning and not used
again in this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings

import torch

from bitkernels.backends.cuda import kernels, plan

MOST_PLANS = 4096
OPS = ("packed_conv2d", "packed_linear")
_lock = threading.RLock()
_trust: dict[tuple[str, str, int], str | None] = {}
_unusable: dict[int, str | None] = {}
_plans: dict[tuple, tuple[tuple[kernels.Kernel, ...], str]] = {}


def clear() -> None:
    """Forgets what has been checked; the next calls check again."""
    from bitkernels.backends.cuda import launch

    with _lock:
        _trust.clear()
        _unusable.clear()
        _plans.clear()
        launch.clear()


def mode() -> str:
    return os.environ.get("BITKERNELS_CUDA", "")


def why_unusable(device: torch.device) -> str | None:
    """Why no kernel of csrc/cuda runs on this device, or None."""
    from bitkernels.backends.cuda import compiler, launch

    if torch.version.hip:
        return "these kernels are for NVIDIA GPUs"
    arch = launch.architecture(device)
    if arch is None:
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor} has no 1-bit tensor core" + (
            " (it is emulated there)" if major > 9 else "")
    if importlib.util.find_spec("cupy_backends") is None:
        return "CuPy is not installed (pip install cupy-cuda13x 'nvidia-cuda-nvrtc>=13,<14')"
    try:
        newest = compiler.version()
        known = compiler.architectures()
    except Exception as error:  # a missing or broken library
        return f"NVRTC does not load: {type(error).__name__}: {error}"
    if int(arch[3:5]) not in known:
        return f"NVRTC {newest[0]}.{newest[1]} does not compile for {arch}"
    try:
        driver = launch.driver().version()
    except Exception as error:
        return f"the CUDA driver does not load: {type(error).__name__}: {error}"
    if driver[0] < newest[0]:
        return (f"the driver knows CUDA {driver[0]}.{driver[1]} and NVRTC is {newest[0]}."
                f"{newest[1]}")
    return None


def attempt(op: str, args, kw):
    """What the kernels return for a call with checked arguments, or None: the next backend's."""
    if op not in OPS or mode() == "0" or (mode() != "1" and not plan.table()):
        return None
    device = args[0].device
    found, _ = _plan(op, args, kw, device)
    from bitkernels.backends.cuda import launch

    for kernel in found:
        if not _trusted(op, kernel, device):
            continue
        try:
            with _on(device):
                return getattr(launch, op)(kernel, *args, **kw)
        except torch.OutOfMemoryError:
            raise
        except launch.Capturing as error:
            raise RuntimeError(f"bitkernels::{op}: {error}") from None
        except Exception as error:
            _distrust(op, kernel, device, f"failed: {type(error).__name__}: {error}")
    return None


def explain(op: str, *args, **kw) -> str:
    """Which kernel a call would run and why, in one line; runs nothing but the self-check."""
    if op not in OPS:
        return f"{op} has no kernel in csrc/cuda"
    device = args[0].device
    found, reason = _plan(op, args, kw, device)
    for kernel in found:
        if _trusted(op, kernel, device):
            return f"cuda: {kernel.name}, {reason}"
        reason = f"{kernel.name} {_trust[op, kernel.name, _index(device)]}"
    return f"the next backend: {reason}"


def _on(device: torch.device):
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _index(device: torch.device) -> int:
    return -1 if device.index is None else device.index


def _reason(device: torch.device) -> str | None:
    with _lock:
        if _index(device) not in _unusable:
            reason = _unusable[_index(device)] = why_unusable(device)
            if reason is not None and mode() == "1":
                warnings.warn(f"bitkernels: {reason}; BITKERNELS_CUDA=1 has no effect on {device}",
                              stacklevel=2)
        return _unusable[_index(device)]


def _plan(op: str, args, kw, device) -> tuple[tuple[kernels.Kernel, ...], str]:
    """Kernels to try, and why they (or none) are chosen. Made once for calls that look alike."""
    key = (op, _index(device), mode(), os.environ.get("BITKERNELS_CUDA_KERNEL"),
           *map(_look, args), *((name, _look(value)) for name, value in kw.items()))
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        found = _plans[key] = _new_plan(op, args, kw, device)
    return found


def _look(value):
    """What a plan may depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.data_ptr() % 16, value.is_contiguous()
    return tuple(value) if isinstance(value, list) else value


def _new_plan(op: str, args, kw, device) -> tuple[tuple[kernels.Kernel, ...], str]:
    reason = _reason(device)
    if reason is not None:
        return (), reason
    from bitkernels.backends.cuda import launch

    arch = launch.architecture(device)
    assert arch is not None
    if mode() == "0":
        return (), "BITKERNELS_CUDA is 0"
    reason = launch.outside(op, args, kw)
    if reason is not None:
        return (), f"these kernels do not take {reason}"
    problem = launch.problem(op, args, kw)
    measured = plan.nearest(arch, problem)
    found = plan.modelled(kernels.FAMILIES[arch], problem, launch.multiprocessors(device))
    if mode() != "1":
        if measured is None:
            return (), (f"no kernel of csrc/cuda has been proven near this shape on {arch} yet; "
                        "BITKERNELS_CUDA=1 opts in")
        found = measured.faster(found)
        if not found:
            return (), f"{plan.NEXT} was measured to be faster near this shape"
    forced = os.environ.get("BITKERNELS_CUDA_KERNEL")
    if forced:
        if forced not in kernels.ALL or forced == kernels.PREPARE.name:
            names = ", ".join(n for n in kernels.ALL if n != kernels.PREPARE.name)
            raise RuntimeError(f"BITKERNELS_CUDA_KERNEL must be one of {names}, got {forced!r}")
        found = tuple(k for k in found if k.name == forced)
        return found, ("BITKERNELS_CUDA_KERNEL names it" if found else
                       f"{forced}, which BITKERNELS_CUDA_KERNEL names, does not take this call")
    if measured is None:
        return found, "unproven, by BITKERNELS_CUDA=1"
    found = measured.order(found)
    return found, measured.said(found[0])


def _trusted(op: str, kernel: kernels.Kernel, device: torch.device) -> bool:
    key = op, kernel.name, _index(device)
    with _lock:
        if key not in _trust:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"bitkernels::{op}: the first call on {device} checks the "
                                   "kernel and cannot be captured; call it once before the capture")
            from bitkernels.backends.cuda import selfcheck

            _trust[key] = None
            try:
                with _on(device):
                    failure = selfcheck.failure(op, kernel, device)
            except Exception as error:
                failure = f"failed: {type(error).__name__}: {error}"
            if failure is not None:
                _distrust(op, kernel, device, failure)
        return _trust[key] is None


def _distrust(op: str, kernel: kernels.Kernel, device: torch.device, what: str) -> None:
    with _lock:
        _trust[op, kernel.name, _index(device)] = what
    warnings.warn(f"bitkernels: the CUDA kernel {kernel.name} of {op} on {device} {what}; the next "
                  "kernel runs instead", stacklevel=2)
