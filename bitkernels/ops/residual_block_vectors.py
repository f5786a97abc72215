"""The arithmetic of a residual block on vectors of its channels: residual_block_statistics between
its passes of the forward, residual_block_gradients between those of the backward.

All in float64, one rounding a step; the square root, its inverse and the quotients are IEEE's, so
every device gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitkernels.ops._checks import REAL, check_same_device, check_vectors, describe, fail
from bitkernels.ops._record import Call, Operator, Sample, define, dispatched, each


class Statistics(NamedTuple):
    """Rows of what residual_block_statistics returns first, float64 (C,) each."""

    center: Tensor  # mean of dot
    factor: Tensor  # of scale * dot
    normal: Tensor  # of dot - center, to give the normalized value
    slope: Tensor  # of dot
    offset: Tensor
    values: Tensor  # how many, the same number in every channel


def check_statistics(moments, scale, weight, bias, eps, dtype):
    op = "residual_block_statistics"
    if (moments.dtype not in (torch.int64, torch.float64) or moments.dim() != 2
            or moments.shape[0] != 3):
        fail(op, "moments", "int64 or float64 of shape (3, C)", describe(moments))
    check_vectors(op, moments, moments.shape[1], scale=scale, weight=weight, bias=bias)
    if not eps >= 0:
        fail(op, "eps", "at least 0", f"{eps:g}")
    if dtype not in REAL:
        fail(op, "dtype", "a real type", dtype)
    return Call((moments, scale, weight, bias, eps, dtype))


def fake_statistics(moments, scale, weight, bias, eps, dtype):
    channels = moments.shape[1]
    return (moments.new_empty((len(Statistics._fields), channels), dtype=torch.float64),
            *(moments.new_empty(channels, dtype=dtype) for _ in range(2)))


def reference_statistics(moments, scale, weight, bias, eps, dtype):
    """The affine function of dot that normalizes scale * dot; its mean and unbiased variance."""
    total, squares, count = moments.double().unbind(0)
    center = total / count
    variance = (squares / count - center * center).clamp_min(0)
    mean = center
    if scale is not None:
        alpha = scale.double()
        mean, variance = mean * alpha, variance * alpha * alpha
    inverse = _inverse_root(variance + eps)
    factor = inverse if weight is None else inverse * weight.double()
    normal = inverse if scale is None else inverse * alpha
    slope = factor if scale is None else factor * alpha
    offset = slope * center
    offset = -offset if bias is None else bias.double() - offset
    unbiased = variance * (count / (count - 1).clamp_min(1))
    vectors = torch.stack(Statistics(center, factor, normal, slope, offset, count))
    return vectors, *(t.to(dtype, copy=True) for t in (mean, unbiased))


def _inverse_root(t: Tensor) -> Tensor:
    """The root and its inverse, each rounded to the nearest.

    On CPUs torch.sqrt may be MKL's, off by a unit in one value of a hundred, on other processors in
    others; rsqrt takes the processor's root there, and on GPUs an approximation.
    """
    return t.rsqrt() if t.device.type == "cpu" else t.sqrt().reciprocal()


def check_gradients(sums, total, vectors, scale, dtype):
    op, double = "residual_block_gradients", torch.float64
    if sums.dtype != double or sums.dim() != 2 or sums.shape[0] != 4:
        fail(op, "sums", "float64 of shape (4, C)", describe(sums))
    channels = sums.shape[1]
    if total is not None and (total.dtype != double or total.shape != (2, channels)):
        fail(op, "total", f"float64 of shape {(2, channels)}", describe(total))
    shape = len(Statistics._fields), channels
    if vectors.dtype != double or vectors.shape != shape:
        fail(op, "vectors", f"float64 of shape {shape}", describe(vectors))
    check_same_device(op, sums, total=total, vectors=vectors)
    check_vectors(op, sums, channels, scale=scale)
    if dtype not in REAL:
        fail(op, "dtype", "a real type", dtype)
    return Call((sums, total, vectors, scale, dtype))


def fake_gradients(sums, total, vectors, scale, dtype):
    channels = sums.shape[1]
    # Tensors of their own: gradients of parameters must not share memory.
    return sums.new_empty((3, channels)), *(sums.new_empty(channels, dtype=dtype) for _ in range(5))


def reference_gradients(sums, total, vectors, scale, dtype):
    """(p, q, r) of residual_block_norm_backward; gradients of norm weight, norm bias, shift_in,
    slope and shift_out."""
    v = Statistics(*vectors.unbind(0))
    value, norm, slope, grad = sums.unbind(0)
    mean, product = ((sums[:2] if total is None else total) / v.values).unbind(0)
    p = v.factor if scale is None else v.factor * scale.double()
    minus = -p
    q = minus * v.normal * v.normal * product
    grads = norm * v.normal, value, value, slope, grad
    return torch.stack((p, q, minus * mean)), *(t.to(dtype, copy=True) for t in grads)


def statistics(run, moments, *rest):
    """The operator, or on a CPU what it would run: its way costs as much again as its arithmetic.
    """
    if moments.device.type == "cpu" and run is dispatched:
        return reference_statistics(moments, *rest)
    return run("residual_block_statistics", moments, *rest)


def gradients(run, sums, *rest):
    """As `statistics`."""
    if sums.device.type == "cpu" and run is dispatched:
        return reference_gradients(sums, *rest)
    return run("residual_block_gradients", sums, *rest)


def _moments(v) -> Tensor:
    """Of 37 channels with 60 values each; one channel's are all equal."""
    dot = v.integers(-9, 10, 60, 37).long()
    dot[:, 3] = 5
    return torch.stack((dot.sum(0), (dot * dot).sum(0), torch.full((37,), 60)))


def samples_statistics(v):
    moments, c = _moments(v), [v.real(37) for _ in range(3)]
    return [Sample((moments, None, None, None, 1e-5, torch.float64), kernel={}),
            Sample((moments.double(), *c, 1e-3, torch.float32), kernel={}),
            Sample((moments, c[0].double(), c[1].half(), None, 0.5, torch.float16), kernel={})]


def samples_gradients(v):
    sums, c = v.real(4, 37).double(), v.real(37)
    vectors = reference_statistics(_moments(v), None, c, c, 1e-5, torch.float32)[0]
    return [Sample((sums, None, vectors, None, torch.float32), kernel={}),
            Sample((sums, v.real(2, 37).double(), vectors, c.half(), torch.float16), kernel={})]


define(Operator(
    schemas=("residual_block_statistics(Tensor moments, Tensor? scale, Tensor? weight, "
             "Tensor? bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",),
    group="The residual block", check=check_statistics, fake=fake_statistics,
    reference=reference_statistics, samples=samples_statistics, batched=each, engine=False,
    text="""
The batch norm of a residual block as an affine function of its dot products.

Arguments:
  moments: int64 or float64 (3, C): sum, sum of squares and count of the dot products, as of
    packed_conv2d_moments.
  scale: real (C,), a factor of dot before the norm; None: 1.
  weight: real (C,), the norm's; None: 1.
  bias: real (C,), the norm's; None: 0.
  eps: of the norm, at least 0.
  dtype: of mean and variance.
Returns:
  (vectors, mean, variance). vectors is float64 (6, C): the mean of dot; the factor of scale dot;
  the factor of dot - mean that gives the normalized value; the factor and the shift of dot that
  give the norm's output; the count. mean and unbiased variance, (C,), are of scale dot.
Errors:
  shapes, types or devices that do not fit, an eps below 0; tensors that require a gradient.
Example:
  >>> moments = torch.tensor([[6], [20], [2]])  # of 2 and 4
  >>> vectors, mean, variance = ops.residual_block_statistics(
  ...     moments, None, None, None, 0.0, torch.float32)
  >>> vectors[3:5].flatten().tolist(), mean.item(), variance.item()
  ([1.0, -3.0], 3.0, 2.0)
"""))
define(Operator(
    schemas=("residual_block_gradients(Tensor sums, Tensor? total, Tensor vectors, Tensor? scale, "
             "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",),
    group="The residual block", check=check_gradients, fake=fake_gradients,
    reference=reference_gradients, samples=samples_gradients, batched=each, engine=False,
    text="""
From the sums of residual_block_backward to what its second pass takes, and to the gradients of
the vectors.

Arguments:
  sums: float64 (4, C), of residual_block_backward.
  total: float64 (2, C), the first two of them over all processes whose batches are normalized
    together; None: sums.
  vectors: float64 (6, C), of residual_block_statistics.
  scale: real (C,), a factor of the gradient of dot; None: 1.
  dtype: of the vectors' gradients.
Returns:
  (pqr, norm_weight, norm_bias, shift_in, slope, shift_out): p, q and r of
  residual_block_norm_backward, float64 (3, C), and the gradients of the vectors, (C,).
Errors:
  shapes, types or devices that do not fit; tensors that require a gradient.
Example:
  >>> sums = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
  >>> vectors = torch.ones(6, 1, dtype=torch.float64)
  >>> pqr, *grads = ops.residual_block_gradients(sums, None, vectors, None, torch.float32)
  >>> pqr.flatten().tolist(), [g.item() for g in grads]
  ([1.0, -2.0, -1.0], [2.0, 1.0, 1.0, 3.0, 4.0])
"""))
