"""rprelu and rprelu_backward: a PReLU between two learned shifts."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._dispatch import FirstOrder, below_autograd, differentiate
from bitkernels.ops._checks import check_channels, check_grad_like
from bitkernels.ops._contract import per_channel, wide
from bitkernels.ops._record import (
    Call,
    Operator,
    Sample,
    channels_last,
    define,
    each,
    images,
    inside,
)
from bitkernels.ops.geometry import empty_around

ops = torch.ops.bitkernels


def check(input, shift_in, slope, shift_out):
    check_channels("rprelu", input, shift_in=shift_in, slope=slope, shift_out=shift_out)
    return Call((input, shift_in, slope, shift_out))


def fake(input, *_):
    return empty_around(input, 1)


def reference(input: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    y = wide(input) + per_channel(shift_in, input)
    y = torch.where(y > 0, y, y * per_channel(slope, input)) + per_channel(shift_out, input)
    return y.to(input.dtype)


class _RPReLU(FirstOrder):
    operator = "rprelu"
    onnx = staticmethod(reference)

    @staticmethod
    def call(*tensors):
        return ops.rprelu.default(*tensors)

    below = call

    @staticmethod
    def forward(ctx, input, shift_in, slope, shift_out):
        ctx.save_for_backward(input, shift_in, slope)
        ctx.shift_out_dtype = shift_out.dtype
        with below_autograd():
            return ops.rprelu.default(input, shift_in, slope, shift_out)

    @staticmethod
    def backward(ctx, tensors, grad):
        input, shift_in, slope = tensors
        grads = inside(grad)("rprelu_backward", grad, input, shift_in, slope)
        return (grads[0], grads[1].to(shift_in.dtype), grads[2].to(slope.dtype),
                grads[3].to(ctx.shift_out_dtype))


def autograd(*tensors):
    """Its arguments are checked below: by the backend that runs."""
    return differentiate(_RPReLU, tensors)


def samples(v):
    x, vectors = v.leaf(2, 37, 5, 6), [v.leaf(37) for _ in range(3)]
    return [Sample((x, *vectors)), Sample((channels_last(x).detach().half(), *vectors)),
            *(Sample((t, *(v.real(70) for _ in range(3))), kernel={})
              for t in (v.real(2, 70, 5, 6), channels_last(v.real(2, 70, 5, 6).half())))]


def check_backward(grad, input, shift_in, slope):
    op = "rprelu_backward"
    check_channels(op, input, shift_in=shift_in, slope=slope)
    check_grad_like(op, grad, input)
    return Call((grad, input, shift_in, slope))


def fake_backward(grad, input, shift_in, slope):
    vector = input.new_empty((input.shape[1],), dtype=torch.float32)
    return empty_around(input, 1), vector, torch.empty_like(vector), torch.empty_like(vector)


def reference_backward(grad: Tensor, input: Tensor, shift_in: Tensor, slope: Tensor):
    """Gradients of (input, shift_in, slope, shift_out); the vectors' are float32."""
    y = wide(input) + per_channel(shift_in, input)
    g = grad.to(y.dtype)
    grad_input = torch.where(y > 0, g, g * per_channel(slope, input))
    reduce = [d for d in range(input.dim()) if d != 1]
    grad_slope = torch.where(y > 0, torch.zeros_like(g), g * y).sum(reduce)
    return (grad_input.to(input.dtype), grad_input.sum(reduce).float(), grad_slope.float(),
            g.sum(reduce).float())


def samples_backward(v):
    x, shift = v.real(2, 37, 5, 6), v.real(37)
    return [Sample((x, channels_last(x), shift, shift)),
            *(Sample((v.real(2, 70, 5, 6).to(t.dtype), t, v.real(70), v.real(70)), kernel={})
              for t in (v.real(2, 70, 5, 6), channels_last(v.real(2, 70, 5, 6).half())))]


define(Operator(
    schemas=("rprelu_backward(Tensor grad, Tensor input, Tensor shift_in, Tensor slope)"
             " -> (Tensor, Tensor, Tensor, Tensor)",),
    group="Training", check=check_backward, fake=fake_backward, reference=reference_backward,
    samples=samples_backward, batched=each,
    text="""
The gradients of rprelu.

Arguments:
  grad: of the output, the shape and dtype of input.
  input: as of rprelu.
  shift_in: as of rprelu.
  slope: as of rprelu.
Returns:
  the gradients of input, shift_in, slope and shift_out; the vectors' are float32 (C,).
Errors:
  those of rprelu; a grad of another shape or dtype.
Example:
  >>> x, zero, slope = torch.tensor([[-4.0, 3.0]]), torch.zeros(2), torch.full((2,), 0.25)
  >>> ops.rprelu_backward(torch.ones(1, 2), x, zero, slope)[0].tolist()
  [[0.25, 1.0]]
"""))
define(Operator(
    schemas=("rprelu(Tensor input, Tensor shift_in, Tensor slope, Tensor shift_out) -> Tensor",),
    group="Training", check=check, fake=fake, reference=reference, autograd=autograd,
    samples=samples, batched=images("input"),
    text="""
A PReLU between two learned shifts: ReActNet's RPReLU. Differentiable in all arguments.

With y = input + shift_in: y + shift_out where y > 0, else slope y + shift_out.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, C, ...).
  shift_in: real (C,).
  slope: real (C,), also 0 or negative.
  shift_out: real (C,).
Returns:
  the shape and dtype of input.
Errors:
  an input with another number of channels than the vectors, fewer than two dimensions, integers.
Example:
  >>> zero, slope = torch.zeros(2), torch.full((2,), 0.25)
  >>> ops.rprelu(torch.tensor([[-4.0, 3.0]]), zero, slope, zero).tolist()
  [[-1.0, 3.0]]
"""))
