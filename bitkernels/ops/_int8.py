"""What the int8 operators share: activations rounded to integers, exact sums, scale and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.ops._checks import check_same_device, check_vectors, describe, fail

MOST_PRODUCTS = (2**31 - 1) // (127 * 128)  # whose sum int32 holds, whatever they are
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal float32 numbers


def check_operands(op: str, input: Tensor, weight: Tensor, sizes: tuple[str, str],
                   rank: int) -> None:
    """A float32 input and an int8 weight, of `sizes` in words."""
    if input.dtype != torch.float32 or (input.dim() != rank if rank == 4 else input.dim() < 1):
        fail(op, "input", f"float32 of shape {sizes[0]}", describe(input))
    if weight.dtype != torch.int8 or weight.dim() != rank:
        fail(op, "weight", f"int8 of shape {sizes[1]}", describe(weight))
    check_same_device(op, input, weight=weight)


def check_rest(op: str, input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
               steps: float) -> None:
    products = weight.shape[1:].numel()
    if products < 1 or products > MOST_PRODUCTS:
        fail(op, "weight", f"of 1 to {MOST_PRODUCTS} products a sum", products)
    check_vectors(op, input, weight.shape[0], scale=scale, bias=bias)
    if not _SMALLEST <= steps <= _LARGEST:
        fail(op, "steps", "a positive float32 number", f"{steps:g}")


def quantize(input: Tensor, steps: float) -> Tensor:
    """round(input * steps), halves to even, in [-127, 127]; NaN is 0. Integers in float64."""
    most = torch.nan_to_num(input * steps, nan=0.0, posinf=127.0, neginf=-127.0)
    return most.clamp(-127, 127).round().double()


def finish(dot: Tensor, scale: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """float32(dot) * scale, then + bias; of the channels in `dim`, two roundings.

    dot: integers in float64, where a single product may be -0, which no integer is.
    """
    around = [-1 if d == dim else 1 for d in range(dot.dim())]
    y = dot.int().float() * scale.float().view(around)
    return y if bias is None else y + bias.float().view(around)


ARGUMENTS = """\
  scale: float32, float16, bfloat16 or float64, (Cout,): what one step of the sum is worth.
  bias: as scale, or None.
  steps: of the activations, how many there are in 1: 127 / max |input|.
"""
