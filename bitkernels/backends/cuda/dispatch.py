"""Picks csrc/cuda or the next backend for a call, and says why.

Environment, read at call time:
  BITKERNELS_CUDA         1: any kernel that takes the call, but for those that must have been
                          measured near it; 0: none. Unset: only what plan.py has measurements
                          of, near the call and faster than the next backend
  BITKERNELS_CUDA_KERNEL  the name of one kernel to run wherever it fits (for measuring)

The first use of a kernel on a device runs small cases and compares them bit for bit with the
reference (`backends/trust.py`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from bitkernels.backends import gpus, replay
from bitkernels.backends.answer import Answer
from bitkernels.backends.cuda import kernels, plan
from bitkernels.backends.cuda.recent import Recent
from bitkernels.backends.cuda.spec import Spec
from bitkernels.backends.trust import Capturing, Trust, Usable, index

MOST_PLANS = 4096
# Shapes that kernels are compiled for unasked. Each takes seconds once, which a network with free
# image sizes must not spend for ever: after so many Triton runs new ones, whose kernels take the
# sizes of an image as arguments.
MOST_UNASKED = 128
OPS = ("packed_conv2d", "packed_linear", "packed_conv2d_moments")


class Plan(NamedTuple):
    """candidates: to try, the preferred first; empty where the next backend runs. reason: why, in
    words. unasked: the shape, where it counts among `MOST_UNASKED` once it runs."""

    candidates: tuple[kernels.Kernel, ...]
    reason: str
    unasked: Spec | None = None


_unasked: set[Spec] = set()
_plans: Recent[tuple, Plan] = Recent(MOST_PLANS)


def clear() -> None:
    """Forgets what has been checked; the next calls check again."""
    from bitkernels.backends.cuda import launch

    trust.clear()
    usable.clear()
    _unasked.clear()
    _plans.clear()
    replay.clear()
    launch.clear()


def mode() -> str:
    return os.environ.get("BITKERNELS_CUDA", "")


def install() -> str:
    """The command for an NVRTC that this machine's driver knows, of CUDA 12 or 13."""
    from bitkernels.backends.cuda import launch

    try:
        major = launch.driver().version()[0]
    except Exception:  # without a driver nothing depends on it
        major = 13
    return ("pip install cuda-pathfinder nvidia-cuda-nvrtc-cu12" if major == 12 else
            "pip install cuda-pathfinder 'nvidia-cuda-nvrtc>=13,<14'")


def why_unusable(device: torch.device) -> str | None:
    """Why no kernel of csrc/cuda runs on this device, or None."""
    from bitkernels.backends.cuda import compiler, launch

    gpu = gpus.of(device)
    if gpu is not None and gpu.capability is None:
        return "these kernels are for NVIDIA GPUs"
    arch = launch.architecture(device)
    if arch is None:
        assert gpu is not None and gpu.capability is not None
        return f"{gpu.architecture} has no 1-bit tensor core" + (
            " (it is emulated there)" if gpu.capability[0] > 9 else "")
    if gpus.planned():
        return None
    try:
        newest = compiler.version()
        known = compiler.architectures()
    except Exception as error:  # a missing or broken library
        return f"NVRTC does not load: {type(error).__name__}: {error} ({install()})"
    if int(arch[3:5]) not in known:
        return f"NVRTC {newest[0]}.{newest[1]} does not compile for {arch}"
    try:
        driver = launch.driver().version()
    except Exception as error:
        return f"the CUDA driver does not load: {type(error).__name__}: {error}"
    if driver[0] < newest[0]:
        remedy = install() if driver[0] > 11 else "they need a driver of CUDA 12 or later"
        return (f"the driver knows CUDA {driver[0]}.{driver[1]} and NVRTC is {newest[0]}."
                f"{newest[1]} ({remedy})")
    return None


def attempt(op: str, args, kw):
    """What the kernels return for a call with checked arguments, or None: the next backend's."""
    asked = mode()
    if op not in OPS or asked == "0" or (asked != "1" and not plan.table()):
        return None
    device = args[0].device
    found = _plan(op, args, kw, device, asked)
    if not found.candidates:
        return None
    from bitkernels.backends.cuda import launch

    for kernel in found.candidates:
        if not _trusted(op, kernel, device):
            continue
        try:
            result = trust.run((op, kernel.name), device, getattr(launch, op), kernel, *args, **kw)
        except Capturing as error:
            raise RuntimeError(f"bitkernels::{op}: {error}") from None
        if result is not None:
            return result
    return None


def explain(op: str, *args, **kw) -> Answer:
    """Which kernel a call with checked arguments would run, and why; runs and checks nothing."""
    if op not in OPS:
        return Answer("cuda", None, f"{op} has no kernel in csrc/cuda")
    device = args[0].device
    found = decide(op, args, kw, device)
    wrong = ""
    for kernel in found.candidates:
        tried, known = trust.state((op, kernel.name), device)
        if tried:
            return Answer("cuda", kernel.name, wrong + found.reason, wrong + known)
        wrong += f"{kernel.name} {known}; "
    return Answer("cuda", None, wrong.removesuffix("; ") or found.reason)


def _plan(op: str, args, kw, device, asked: str | None = None) -> Plan:
    """`decide`, made once for calls that look alike; its shape counts from here on. asked: `mode()`
    where it is known."""
    asked = mode() if asked is None else asked
    key = (op, index(device), asked, os.environ.get("BITKERNELS_CUDA_KERNEL"),
           *[_look(value) for value in args], *kw, *[_look(value) for value in kw.values()])
    found = _plans.get(key)
    if found is None:
        usable.obstacle(
            device, why_unusable, lambda why:
            f"{why}; BITKERNELS_CUDA=1 has no effect on {device}" if asked == "1" else None)
        found = decide(op, args, kw, device)
        _plans.put(key, found)
        if found.unasked is not None:
            _unasked.add(found.unasked)
    return found


def _look(value):
    """What a plan may depend on."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.data_ptr() % 16, value.is_contiguous()
    return tuple(value) if isinstance(value, list) else value


def decide(op: str, args, kw, device) -> Plan:
    """Of a call of `OPS` with checked arguments: what `attempt` goes by and `explain` reports."""
    if mode() == "0":
        return Plan((), "BITKERNELS_CUDA is 0")
    reason = usable.reason(device, why_unusable)
    if reason is not None:
        return Plan((), reason)
    from bitkernels.backends.cuda import launch

    arch = launch.architecture(device)
    assert arch is not None
    reason = launch.outside(op, args, kw)
    if reason is not None:
        return Plan((), f"these kernels do not take {reason}")
    problem = launch.problem(op, args, kw)
    measured = plan.nearest(arch, problem)
    found = plan.modelled(kernels.FAMILIES[arch], problem, launch.multiprocessors(device))
    lost = "" if measured is None else measured.lost(found, problem)
    unasked = None
    if mode() != "1":
        if measured is None:
            return Plan((), "no kernel of csrc/cuda has been proven near this shape on "
                            f"{arch} yet; BITKERNELS_CUDA=1 opts in")
        found = measured.faster(found)
        if not found:
            return Plan((), lost or f"{plan.NEXT} was measured to be faster near this shape")
        unasked = problem.spec
        if unasked not in _unasked and len(_unasked) >= MOST_UNASKED and not gpus.planned():
            return Plan((), f"kernels for {MOST_UNASKED} shapes have been compiled in this process"
                            f", and {plan.NEXT}'s takes every image size; BITKERNELS_CUDA=1 lifts "
                            "the limit")
    forced = os.environ.get("BITKERNELS_CUDA_KERNEL")
    if forced:
        if forced not in kernels.ALL or forced == kernels.PREPARE.name:
            names = ", ".join(n for n in kernels.ALL if n != kernels.PREPARE.name)
            raise RuntimeError(f"BITKERNELS_CUDA_KERNEL must be one of {names}, got {forced!r}")
        found = tuple(k for k in found if k.name == forced)
        said = ("BITKERNELS_CUDA_KERNEL names it" if found else
                f"{forced}, which BITKERNELS_CUDA_KERNEL names, "
                + _why_not(kernels.ALL[forced], problem, arch))
        return Plan(found, said, unasked)
    found = plan.allowed(found, measured)
    if not found:
        refused: dict[str, list[str]] = {}
        for kernel in kernels.ALL.values():
            if kernel.family in kernels.FAMILIES[arch]:
                refused.setdefault(_why_not(kernel, problem, arch), []).append(kernel.name)
        return Plan((), "; ".join(f"{', '.join(names)}: {why}" for why, names in refused.items()))
    if measured is None:
        return Plan(found, "unproven, by BITKERNELS_CUDA=1")
    found = measured.order(found)
    return Plan(found, "; ".join(filter(None, (measured.said(found[0]), lost))), unasked)


def _why_not(kernel: kernels.Kernel, problem: plan.Problem, arch: str) -> str:
    if kernel.family not in kernels.FAMILIES[arch]:
        return f"is no kernel of {arch}"
    return (kernel.refusal(problem)
            or f"was not measured to be faster than {plan.NEXT} near this shape")


def _trusted(op: str, kernel: kernels.Kernel, device: torch.device) -> bool:
    if trust.passed((op, kernel.name), device):
        return True

    def failure() -> str | None:
        from bitkernels.backends.cuda import selfcheck

        return selfcheck.failure(op, kernel, device)

    return trust.has((op, kernel.name), device, failure)


def _warning(key: tuple[str, str], device: torch.device, what: str) -> str:
    return f"the CUDA kernel {key[1]} of {key[0]} on {device} {what}; the next kernel runs instead"


trust, usable = Trust(_warning), Usable()
