"""Picks csrc/cuda or the next backend for a call, and says why.

Environment, read at call time:
  BITKERNELS_CUDA         1: any kernel that takes the call; 0: none. Unset: only what plan.py
                          has measurements of, near the call and faster than the next backend
  BITKERNELS_CUDA_KERNEL  the name of one kernel to run wherever it fits (for measuring)

The first use of a kernel on a device runs small cases and compares them bit for bit with the
reference (`backends/trust.py`).
"""

from __future__ import annotations

import importlib.util
import os

import torch

from bitkernels.backends.cuda import kernels, plan
from bitkernels.backends.cuda.spec import Spec
from bitkernels.backends.trust import Capturing, Trust, Usable, index

MOST_PLANS = 4096
# Shapes that kernels are compiled for unasked. Each takes seconds once and stays loaded, which a
# network with free image sizes must not do for ever.
MOST_UNASKED = 128
OPS = ("packed_conv2d", "packed_linear")
_unasked: set[Spec] = set()
_plans: dict[tuple, tuple[tuple[kernels.Kernel, ...], str]] = {}


def clear() -> None:
    """Forgets what has been checked; the next calls check again."""
    from bitkernels.backends.cuda import launch

    trust.clear()
    usable.clear()
    _unasked.clear()
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
            result = trust.run((op, kernel.name), device, getattr(launch, op), kernel, *args, **kw)
        except Capturing as error:
            raise RuntimeError(f"bitkernels::{op}: {error}") from None
        if result is not None:
            return result
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
        reason = f"{kernel.name} {trust.verdict((op, kernel.name), device)}"
    return f"the next backend: {reason}"


def _reason(device: torch.device) -> str | None:
    asked = mode() == "1"
    return usable.obstacle(
        device, why_unusable,
        lambda why: f"{why}; BITKERNELS_CUDA=1 has no effect on {device}" if asked else None)


def _plan(op: str, args, kw, device) -> tuple[tuple[kernels.Kernel, ...], str]:
    """Kernels to try, and why they (or none) are chosen. Made once for calls that look alike."""
    key = (op, index(device), mode(), os.environ.get("BITKERNELS_CUDA_KERNEL"),
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
        if problem.spec not in _unasked and len(_unasked) >= MOST_UNASKED:
            return (), (f"kernels for {MOST_UNASKED} shapes have been compiled in this process; "
                        "BITKERNELS_CUDA=1 lifts the limit")
        _unasked.add(problem.spec)
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
    def failure() -> str | None:
        from bitkernels.backends.cuda import selfcheck

        return selfcheck.failure(op, kernel, device)

    return trust.has((op, kernel.name), device, failure)


def _warning(key: tuple[str, str], device: torch.device, what: str) -> str:
    return f"the CUDA kernel {key[1]} of {key[0]} on {device} {what}; the next kernel runs instead"


trust, usable = Trust(_warning), Usable()
