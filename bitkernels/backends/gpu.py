"""GPU tensors: csrc/cuda where its plan has a kernel for the call, else Triton."""

from __future__ import annotations

from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.launchers import register
from bitkernels.backends.triton.dispatch import run as run_triton


def run(op: str, *args, **kw):
    result = cuda.attempt(op, args, kw)
    return run_triton(op, *args, **kw) if result is None else result


register("CUDA", run)
