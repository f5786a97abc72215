"""What the files of wrong arguments share: each row is a call and the words of its error."""

from __future__ import annotations

import torch

ops = torch.ops.bitkernels
FLOATS = "float32, float16, bfloat16 or float64"
ESTIMATORS = "one of ste_sign, approx_sign, swish_sign, identity, none"
# It is told what packed_conv2d is told.
SAYS = {ops.packed_conv2d_moments.default: "bitkernels::packed_conv2d"}
ROWS: list[tuple] = []


def real(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def words(*shape, dtype=torch.int32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def grad(*shape):
    return torch.zeros(shape, requires_grad=True)


def row(op, text: str, *args, **kw):
    """A call of op and its message after 'bitkernels::name: '."""
    ROWS.append((op, text, args, kw))


def identify(entry) -> str:
    op, text, *_ = entry
    return f"{op.__name__}-{text[:48]}"
