"""What follows the dot products of packed operators: schema, help and check, once for all."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.ops._checks import (
    REAL,
    check_channel_vector,
    check_real,
    check_same_device,
    describe,
    fail,
)

SCHEMA = (
    "float? clamp_min=None, float? clamp_max=None, Tensor? scale=None, Tensor? bias=None, "
    "Tensor? residual=None, Tensor? shift_in=None, Tensor? slope=None, Tensor? shift_out=None"
)
REAL_OUT = "ScalarType? dtype=None"
PACKED_OUT = "Tensor? sign_shift=None"

TEXT = """\
  clamp_min: lower bound of the dot products, before everything else; None: none.
  clamp_max: upper bound.
  scale: (Cout,) real, a factor; with bias a folded batch norm.
  bias: (Cout,) real, added after scale.
  residual: real, of the output's shape, added next.
  shift_in: (Cout,) real, added next; with shift_out it needs slope.
  slope: (Cout,) real, the factor of what is not above 0 then.
  shift_out: (Cout,) real, added last.
"""
OUTPUTS_TEXT = """\
  dtype: of the real output: float32 (None), float16, bfloat16, float64; int32: the dot products
    themselves, without epilogue.
"""
PACKED_TEXT = """\
  sign_shift: (Cout,) real, added before the sign of a packed output.
  threshold: int32 (2, Cout) from bitkernels.fold_threshold, alone: the bit is 1 where
    threshold[0] <= dot <= threshold[1].
"""


def check(op: str, words: Tensor, out_shape, cout: int, *, clamp_min=None, clamp_max=None,
                   scale=None, bias=None, residual=None, shift_in=None, slope=None, shift_out=None,
                   dtype=None, sign_shift=None, threshold=None) -> None:
    vectors = dict(scale=scale, bias=bias, shift_in=shift_in, slope=slope, shift_out=shift_out,
                   sign_shift=sign_shift)
    check_same_device(op, words, residual=residual, threshold=threshold, **vectors)
    for arg, t in vectors.items():
        check_channel_vector(op, arg, t, cout)
    for arg, bound in (("clamp_min", clamp_min), ("clamp_max", clamp_max)):
        if bound is not None and bound != bound:
            fail(op, arg, "a number", "nan")
    if slope is None and (shift_in is not None or shift_out is not None):
        fail(op, "slope", "given with shift_in or shift_out", None)
    if residual is not None:
        check_real(op, "residual", residual)
        if tuple(residual.shape) != tuple(out_shape):
            fail(op, "residual", f"of shape {tuple(out_shape)}", describe(residual))
    real_part = any(v is not None for v in (clamp_min, clamp_max, residual, *vectors.values()))
    if dtype == torch.int32:
        if real_part:
            fail(op, "dtype", "a real type when the epilogue has scale, bias, ...", dtype)
    elif dtype is not None and dtype not in REAL:
        fail(op, "dtype", "float32, float16, bfloat16, float64 or int32", dtype)
    if threshold is not None:
        if threshold.dtype != torch.int32 or tuple(threshold.shape) != (2, cout):
            fail(op, "threshold", f"int32 of shape (2, {cout})", describe(threshold))
        if real_part:
            fail(op, "threshold", "alone, without scale, bias, ...", "both")
