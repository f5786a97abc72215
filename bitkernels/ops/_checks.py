"""The vocabulary of argument checks.

Every failure is a RuntimeError that names the operator and the argument, what it takes and what it
got. `csrc/torch/checks.h` says the same words for the C++ engine.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from bitkernels._arguments import INT_MAX as INT_MAX
from bitkernels._arguments import REAL as REAL

HALVES = (torch.float16, torch.bfloat16)
_STRIDED = torch.strided
ESTIMATORS = ("ste_sign", "approx_sign", "swish_sign", "identity", "none")


def fail(op: str, arg: str, takes: str, got: object) -> NoReturn:
    raise RuntimeError(f"bitkernels::{op}: {arg} must be {takes}, got {got}")


def describe(t: Tensor) -> str:
    return f"{str(t.dtype)[6:]} of shape {tuple(t.shape)}"


def check_real(op: str, arg: str, t: Tensor, ndim: int | None = None) -> None:
    if t.layout is not _STRIDED or t.is_nested:
        fail(op, arg, "a dense tensor",
             "a nested one" if t.is_nested else f"one of layout {t.layout}")
    if t.dtype not in REAL:
        fail(op, arg, "float32, float16, bfloat16 or float64", describe(t))
    if ndim is not None and t.dim() != ndim:
        fail(op, arg, f"{ndim}-dimensional", describe(t))


def check_same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    device = first.device
    for arg, t in others.items():
        if t is not None and t.device != device:
            fail(op, arg, f"on {device} as the first argument", t.device)


def check_channel_vector(op: str, arg: str, t: Tensor | None, channels: int) -> None:
    if t is None:
        return
    check_real(op, arg, t)
    if t.dim() != 1 or t.shape[0] != channels:
        fail(op, arg, f"of shape ({channels},)", describe(t))


def check_vectors(op: str, like: Tensor, channels: int, **vectors: Tensor | None) -> None:
    check_same_device(op, like, **vectors)
    for arg, t in vectors.items():
        check_channel_vector(op, arg, t, channels)


def check_channels(op: str, input: Tensor, **vectors: Tensor) -> None:
    """A real input (N, C, ...) and real vectors of its channels."""
    check_real(op, "input", input)
    if input.dim() < 2:
        fail(op, "input", "(N, C, ...)", describe(input))
    check_same_device(op, input, **vectors)
    channels, sizes = input.shape[1], [t.shape for t in vectors.values()]
    # Vectors that agree with each other are a layer's parameters: the input does not fit them.
    agree = all(len(size) == 1 and size == sizes[0] for size in sizes)
    for arg, t in vectors.items():
        if not agree or t.shape[0] == channels:
            check_channel_vector(op, arg, t, channels)
        else:
            check_real(op, arg, t)
            fail(op, "input", f"{t.shape[0]} channels wide for a {arg} of shape {tuple(t.shape)}",
                 f"{channels} channels in {describe(input)}")


def normalize_dim(op: str, t: Tensor, dim: int) -> int:
    if not -t.dim() <= dim < t.dim():
        fail(op, "dim", f"in [{-t.dim()}, {t.dim() - 1}]", dim)
    return dim % t.dim()


def check_shift(op: str, input: Tensor, shift: Tensor, dim: int) -> None:
    """One shift a channel, (C,), or one a channel of each sample: the input's rank, N in dimension
    0, C in `dim`, 1 elsewhere. Where the channels are dimension 0 there are no samples."""
    check_same_device(op, input, shift=shift)
    check_real(op, "shift", shift)
    channels = input.shape[dim]
    if shift.dim() == 1 and shift.shape[0] == channels:
        return
    each = tuple(input.shape[i] if i in (0, dim) else 1 for i in range(input.dim()))
    if dim == 0 or shift.dim() == 1 or tuple(shift.shape) != each:
        takes = f"of shape ({channels},)"
        fail(op, "shift", takes if dim == 0 else f"{takes} or {each}", describe(shift))


def check_clip(op: str, arg: str, clip: float | None) -> None:
    if clip is not None and not clip >= 0:
        fail(op, arg, "at least 0", f"{clip:g}")


def check_beta(op: str, beta: float, *estimators: str) -> None:
    """Of swish_sign, whose slope at 0 it is."""
    if "swish_sign" in estimators and not 0 < beta < float("inf"):
        fail(op, "beta", "above 0 and finite", f"{beta:g}")


def check_estimator(op: str, arg: str, name: str, among: tuple[str, ...] = ESTIMATORS) -> None:
    if name not in among:
        fail(op, arg, f"one of {', '.join(among)}", repr(name))


def check_slope(op: str, estimator: str, clip: float | None, beta: float,
                among: tuple[str, ...] = ESTIMATORS) -> None:
    check_estimator(op, "estimator", estimator, among)
    check_clip(op, "clip", clip)
    check_beta(op, beta, estimator)


def check_grad_like(op: str, grad: Tensor, input: Tensor) -> None:
    check_same_device(op, input, grad=grad)
    if grad.dtype != input.dtype or grad.shape != input.shape:
        fail(op, "grad", describe(input), describe(grad))
