"""The passes of a residual block beside its convolution: residual_block_forward, _backward and
_norm_backward."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.ops._checks import (
    REAL,
    check_real,
    check_same_device,
    check_vectors,
    describe,
    fail,
)
from bitkernels.ops._contract import as_rows, per_channel, wide
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, each
from bitkernels.ops.geometry import empty_real


def _check_dot(op: str, dot: Tensor) -> None:
    if dot.dtype not in (torch.int16, torch.int32) or dot.dim() != 4:
        fail(op, "dot", "int16 or int32 of shape (N, C, H, W)", describe(dot))


def _check_like_dot(op: str, arg: str, t: Tensor, dot: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype or t.shape != dot.shape:
        fail(op, arg, f"{str(dtype)[6:]} of shape {tuple(dot.shape)}", describe(t))


def check_forward(dot, residual, scale, bias, shift_in, slope, shift_out, relu):
    op = "residual_block_forward"
    check_real(op, "residual", residual)
    _check_dot(op, dot)
    _check_like_dot(op, "residual", residual, dot, residual.dtype)
    check_same_device(op, dot, residual=residual)
    check_vectors(op, dot, dot.shape[1], scale=scale, bias=bias, shift_in=shift_in, slope=slope,
                   shift_out=shift_out)
    return Call((dot, residual, scale, bias, shift_in, slope, shift_out, relu))


def fake_forward(dot, residual, *_):
    return empty_real(dot, dot.shape, residual.dtype, True)


def check_backward(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    op = "residual_block_backward"
    check_real(op, "grad", grad)
    _check_dot(op, dot)
    _check_like_dot(op, "grad", grad, dot, grad.dtype)
    check_same_device(op, dot, grad=grad, residual=residual)
    check_vectors(op, dot, dot.shape[1], scale=scale, bias=bias, shift_in=shift_in, slope=slope,
                   center=center)
    if slope is not None:
        if residual is None:
            fail(op, "residual", "given with slope", "None")
        _check_like_dot(op, "residual", residual, dot, grad.dtype)
    return Call((grad, dot, residual, scale, bias, shift_in, slope, center, relu))


def fake_backward(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    sums = dot.new_empty((4, dot.shape[1]), dtype=torch.float64)
    if slope is None:
        return grad.new_empty(0), sums
    return empty_real(dot, dot.shape, grad.dtype, True), sums


def check_norm(op: str, grad: Tensor, dot: Tensor, **vectors: Tensor | None) -> None:
    check_real(op, "grad", grad)
    _check_dot(op, dot)
    _check_like_dot(op, "grad", grad, dot, grad.dtype)
    check_same_device(op, dot, grad=grad)
    check_vectors(op, dot, dot.shape[1], **vectors)


def check_norm_backward(grad, dot, p, q, r, center, relu, dtype):
    op = "residual_block_norm_backward"
    check_norm(op, grad, dot, p=p, q=q, r=r, center=center)
    if dtype not in REAL or (dtype == torch.float64) != (grad.dtype == torch.float64):
        fail(op, "dtype", "a real type, float64 for float64 only", dtype)
    return Call((grad, dot, p, q, r, center, relu, dtype))


def fake_norm_backward(grad, dot, p, q, r, center, relu, dtype):
    return empty_real(dot, dot.shape, dtype, True)


def _value(dot: Tensor, like: Tensor, scale, bias, residual, shift_in, relu: bool) -> Tensor:
    """What the block's activation sees, in the type arithmetic on `like` runs in."""
    d = dot.relu() if relu else dot
    y = d.to(wide(like).dtype) * per_channel(scale, like) + per_channel(bias, like)
    y = y + wide(residual)
    return y if shift_in is None else y + per_channel(shift_in, like)


def reference_forward(dot, residual, scale, bias, shift_in, slope, shift_out, relu):
    """RPReLU(dot * scale + bias + residual), of max(dot, 0) with relu; without slope no PReLU."""
    y = _value(dot, residual, scale, bias, residual, shift_in, relu)
    if slope is not None:
        y = torch.where(y > 0, y, y * per_channel(slope, residual))
    if shift_out is not None:
        y = y + per_channel(shift_out, residual)
    return as_rows(y.to(residual.dtype))


def reference_backward(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    """Gradient of the value under the activation, and float64 sums (4, C) over all but channels.

    The sums are of that gradient, of it times (dot - center) (of max(dot, 0) with relu), of the
    slope's gradient, and of grad. Without slope the gradient is grad itself: empty(0) is returned,
    and the last two sums are 0.
    """
    g = wide(grad)
    d = (dot.relu() if relu else dot).to(g.dtype) - per_channel(center, g)
    sums = [torch.zeros(d.shape[1], dtype=torch.float64, device=d.device)] * 4
    out = grad.new_empty(0)
    if slope is not None:
        y = _value(dot, grad, scale, bias, residual, shift_in, relu)
        sums[2:] = (t.double().sum((0, 2, 3)) for t in (torch.where(y > 0, 0.0, g * y), g))
        g = torch.where(y > 0, g, g * per_channel(slope, g))
        out = as_rows(g.to(grad.dtype))
    sums[:2] = (t.double().sum((0, 2, 3)) for t in (g, g * d))
    return out, torch.stack(sums)


def reference_norm_backward(grad, dot, p, q, r, center, relu, dtype):
    """p grad + q (dot - center) + r per channel; with relu of max(dot, 0), and 0 where dot <= 0."""
    g = wide(grad)
    d = (dot.relu() if relu else dot).to(g.dtype) - per_channel(center, g)
    out = g * per_channel(p, g) + d * per_channel(q, g) + per_channel(r, g)
    return as_rows((torch.where(dot > 0, out, 0.0) if relu else out).to(dtype))


class PassInputs:
    """Of the samples: mixed types and memory orders, over several tiles of rows."""

    def __init__(self, v) -> None:
        shape, half = (2, 70, 5, 9), torch.float16
        self.real, self.grad = v.real(*shape), channels_last(v.real(*shape, dtype=half))
        self.stream = v.real(*shape, dtype=half)
        self.dot = channels_last(v.integers(-9, 10, *shape).short())
        self.c = [v.real(70) for _ in range(6)]
        self.wide = [t.double() for t in self.c]


def samples_forward(v):
    i = PassInputs(v)
    return [Sample((i.dot, i.stream, *i.wide[:2], *i.c[2:5], True), kernel={}),
            Sample((i.dot.int(), i.real, *i.c[:2], None, None, None, False), kernel={})]


def samples_backward(v):
    i = PassInputs(v)
    return [
        Sample((i.real, i.dot.int().contiguous(), i.real, *i.c[:5], False)),
        Sample((i.grad, i.dot, i.stream, *i.wide[:2], *i.c[2:4], i.wide[4], True), kernel={}),
        Sample((i.real, i.dot.int(), None, *i.c[:2], None, None, i.c[4], False), kernel={})]


def samples_norm_backward(v):
    i = PassInputs(v)
    return [Sample((i.grad, i.dot, *i.c[:4], True, torch.bfloat16)),
            Sample((i.grad, i.dot, *i.wide[:4], True, torch.float32), kernel={}),
            Sample((i.real, i.dot.int(), *i.c[:4], False, torch.float16), kernel={})]


define(Operator(
    schemas=("residual_block_forward(Tensor dot, Tensor residual, Tensor scale, Tensor bias, "
             "Tensor? shift_in, Tensor? slope, Tensor? shift_out, bool relu) -> Tensor",),
    group="The residual block", check=check_forward, fake=fake_forward,
    reference=reference_forward, samples=samples_forward, batched=each,
    text="""
The pass of a residual block after its convolution: RPReLU(dot scale + bias + residual).

Arguments:
  dot: int16 or int32 (N, C, H, W), from packed_conv2d_moments.
  residual: real, the shape of dot.
  scale: real (C,).
  bias: real (C,).
  shift_in: real (C,) or None.
  slope: real (C,) or None: no activation.
  shift_out: real (C,) or None.
  relu: take max(dot, 0).
Returns:
  the shape and dtype of residual, channels-last.
Errors:
  shapes, types or devices that do not fit; tensors that require a gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero = torch.ones(2), torch.zeros(2)
  >>> x = torch.ones(1, 2, 1, 1)
  >>> y = ops.residual_block_forward(dot, x, one, zero, None, None, None, False)
  >>> y.flatten().tolist()
  [-2.0, 5.0]
"""))
define(Operator(
    schemas=("residual_block_backward(Tensor grad, Tensor dot, Tensor? residual, Tensor scale, "
             "Tensor bias, Tensor? shift_in, Tensor? slope, Tensor center, bool relu)"
             " -> (Tensor, Tensor)",),
    group="The residual block", check=check_backward, fake=fake_backward,
    reference=reference_backward, samples=samples_backward, batched=each,
    text="""
The first pass of a residual block's backward: the gradient of the value under the activation, and
sums for the gradients of the parameters.

Arguments:
  grad: real, the shape of dot.
  dot: int16 or int32 (N, C, H, W).
  residual: real, the shape of dot and dtype of grad; None without slope.
  scale: real (C,).
  bias: real (C,).
  shift_in: real (C,) or None.
  slope: real (C,); None: no activation; the gradient is grad, and an empty tensor stands for it.
  center: real (C,), subtracted from dot in the sums.
  relu: take max(dot, 0).
Returns:
  (gradient, float64 (4, C): sums of it, of it times dot - center, of the slope's gradient, and of
  grad).
Errors:
  shapes, types or devices that do not fit, a slope without residual; tensors that require a
  gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero, grad = torch.ones(2), torch.zeros(2), torch.ones(1, 2, 1, 1)
  >>> _, sums = ops.residual_block_backward(grad, dot, None, one, zero, None, None, zero, False)
  >>> sums[:2].tolist()
  [[1.0, 1.0], [-3.0, 4.0]]
"""))
define(Operator(
    schemas=("residual_block_norm_backward(Tensor grad, Tensor dot, Tensor p, Tensor q, Tensor r, "
             "Tensor center, bool relu, ScalarType dtype) -> Tensor",),
    group="The residual block", check=check_norm_backward, fake=fake_norm_backward,
    reference=reference_norm_backward, samples=samples_norm_backward, batched=each,
    text="""
The second pass of a residual block's backward: p grad + q (dot - center) + r, per channel.

Arguments:
  grad: real, the shape of dot.
  dot: int16 or int32 (N, C, H, W).
  p: real (C,).
  q: real (C,).
  r: real (C,).
  center: real (C,).
  relu: take max(dot, 0), and 0 where dot <= 0.
  dtype: of the result, float64 for float64 only.
Returns:
  dtype, the shape of dot, channels-last.
Errors:
  shapes, types or devices that do not fit; tensors that require a gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero, grad = torch.ones(2), torch.zeros(2), torch.ones(1, 2, 1, 1)
  >>> out = ops.residual_block_norm_backward(
  ...     grad, dot, one, one, zero, zero, False, torch.float32)
  >>> out.flatten().tolist()
  [-2.0, 5.0]
"""))
