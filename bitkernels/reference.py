"""The numeric contract: the reference of every operator, and what they are written in.

`reference.NAME` is the reference of the operator of that name, from its file in `bitkernels/ops`.
It takes what kernels take: arguments that are checked.
"""

from __future__ import annotations

from typing import Any

from bitkernels.ops._contract import (
    dot_conv2d,
    epilogue,
    estimator_grad,
    pack_bits,
    per_channel,
    sign,
    unpack_bits,
    untile_weight,
)
from bitkernels.ops._record import OPERATORS

__all__ = ["dot_conv2d", "epilogue", "estimator_grad", "pack_bits", "per_channel", "sign",
           "unpack_bits", "untile_weight"]


def __getattr__(name: str) -> Any:
    operator = OPERATORS.get(name)
    if operator is None or operator.reference is None:
        raise AttributeError(f"module 'bitkernels.reference' has no attribute {name!r}")
    return operator.reference
