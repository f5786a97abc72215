"""The backends, and the one place that chooses among them.

Every operator has a reference kernel for all devices (`reference`); a faster backend registers its
own kernels for its device over it. Importing registers names only: nothing is compiled or tuned.
"""

from collections.abc import Callable
from dataclasses import replace

from bitkernels.backends import cpu as cpu
from bitkernels.backends import gpu as gpu
from bitkernels.backends import gpus, reference
from bitkernels.backends.answer import Answer, registered
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.triton import dispatch as triton


def explain(op: str, *args, device: str, **kw) -> Answer:
    """Which backend and kernel take a call, and why, those included that do not take it.

    op, args, kw: as backends get a call, checked. device: "cpu", "cuda" or another type, where the
    call would run. Runs, compiles and checks nothing.
    """
    asked: list[Callable[..., Answer]] = [reference.explain]
    if device == "cpu":
        asked.insert(0, cpu.explain)
    elif device == "cuda" and registered(op, "CUDA"):
        asked[:0] = [cuda.explain, triton.explain] if op in cuda.OPS else [triton.explain]
    refused = []
    for backend in asked:
        answer = backend(op, *args, **kw)
        if answer.kernel is not None:
            break
        refused.append(f"not {answer.backend}: {answer.reason}")
    if len(asked) == 1:
        refused.append(f"no other backend has {op} for {device}")
    return replace(answer, reason="; ".join((answer.reason, *refused)))


__all__ = ["cpu", "explain", "gpu", "gpus", "reference"]
