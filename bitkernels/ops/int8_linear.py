"""int8_linear: a linear layer on real rows, rounded to int8."""

from __future__ import annotations

import torch

from bitkernels.ops import _int8
from bitkernels.ops._checks import describe, fail
from bitkernels.ops._record import Call, Operator, Sample, define, rows

_OP = "int8_linear"


def check(input, weight, scale, bias, steps):
    _int8.check_operands(_OP, input, weight, ("(..., in)", "(out, in)"), 2)
    if input.shape[-1] != weight.shape[1]:
        fail(_OP, "input", f"{weight.shape[1]} wide", describe(input))
    _int8.check_rest(_OP, input, weight, scale, bias, steps)
    return Call((input, weight, scale, bias, steps))


def fake(input, weight, scale, bias, steps):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def reference(input, weight, scale, bias, steps):
    dot = (_int8.quantize(input, steps) @ weight.double().T).round()
    return _int8.finish(dot, scale, bias, dot.dim() - 1)


def samples(v):
    matrix = v.integers(-128, 128, 37, 21).to(torch.int8)
    scale, bias = v.real(37) / 64, v.real(37)
    special = v.real(3, 21)
    special[1, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    return [Sample((v.real(2, 3, 21), matrix, scale, bias, 2.0)),
            Sample((special, matrix, scale, None, 33.3)),
            Sample((v.real(21, 4).T, matrix, scale, bias, 100.0)),
            Sample((v.real(21), matrix, scale, bias, 7.5))]


define(Operator(
    schemas=("int8_linear(Tensor input, Tensor weight, Tensor scale, Tensor? bias, float steps) "
             "-> Tensor",),
    group="Real layers in int8", check=check, fake=fake, reference=reference, samples=samples,
    batched=rows("input"),
    text=f"""
A linear layer on rows, rounded to int8, with an int8 weight: exact sums in int32.

Rounding, scale and bias are those of int8_conv2d.

Arguments:
  input: float32 (..., in).
  weight: int8 (out, in), of at most {_int8.MOST_PRODUCTS} products a sum.
{_int8.ARGUMENTS.replace("(Cout,)", "(out,)")}Returns:
  float32 (..., out).
Errors:
  tensors of another type, rank or width, sums that int32 may not hold, steps that are no positive
  number, an argument that requires a gradient: there is none.
Example:
  >>> x, weight = torch.rand(3, 64), torch.randn(10, 64)
  >>> step = weight.abs().amax(1) / 127
  >>> matrix = (weight / step[:, None]).round().to(torch.int8)
  >>> y = ops.int8_linear(x, matrix, step / 127, None, 127.0)
  >>> bool((y - x @ weight.T).abs().max() < 1)
  True
"""))
