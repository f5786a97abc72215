"""GPU tensors: csrc/cuda where its plan has a kernel for the call, else Triton.

The parts of a residual block are Triton's.
"""

from __future__ import annotations

from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.launchers import BLOCK, register, register_block
from bitkernels.backends.triton.dispatch import run as run_triton


def run(op: str, *args, **kw):
    result = cuda.attempt(op, args, kw)
    return run_triton(op, *args, **kw) if result is None else result


register("CUDA", run)
# The gradients of a convolution from bits stay with the reference: the library's real ones.
register_block("CUDA", run_triton,
               [launcher for launcher in BLOCK if not launcher.__name__.endswith("_grad")])
