"""residual_block_norm_backward_float8: the pass of residual_block.py, with one more result."""

from __future__ import annotations

from bitkernels.backends.triton.residual_block import residual_block_norm_backward
from bitkernels.ops.geometry import empty_real
from bitkernels.ops.residual_block_float8 import FLOAT8


def residual_block_norm_backward_float8(grad, dot, p, q, r, center, scale, relu, dtype):
    rounded = empty_real(dot, dot.shape, FLOAT8, True)
    out = residual_block_norm_backward(grad, dot, p, q, r, center, relu, dtype, scale, rounded)
    return out, rounded
