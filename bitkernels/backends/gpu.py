"""GPU tensors: csrc/cuda where its plan has a kernel for the call, else Triton.

Operators without a Triton kernel stay with the reference: the library's real gradients, for one.
"""

from __future__ import annotations

from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.triton import dispatch as triton
from bitkernels.ops._record import STRAIGHT, register


def run(op: str, *args, **kw):
    if op in cuda.OPS:
        result = cuda.attempt(op, args, kw)
        if result is not None:
            return result
    return triton.run(op, *args, **kw)


register("CUDA", run, triton.OPERATORS)
STRAIGHT["cuda"] = run
