"""Oracles that share no code with the operators: numpy integers and explicit autograd."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels_tests.cases import ConvCase


def pack(bits: np.ndarray) -> Tensor:
    """Booleans (..., C) to int32 words (..., ceil(C/32)) by numpy.packbits."""
    bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)])
    octets = np.ascontiguousarray(np.packbits(bits, axis=-1, bitorder="little"))
    return torch.from_numpy(octets.view("<i4").astype(np.int32))


def unpack(words: Tensor, channels: int) -> np.ndarray:
    """int32 words (..., words) to int64 signs (..., channels) by numpy.unpackbits."""
    octets = np.ascontiguousarray(words.cpu().numpy().astype("<i4")).view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., :channels]
    return bits.astype(np.int64) * 2 - 1


def sign_bits(x: Tensor, dim: int) -> np.ndarray:
    """not (x < 0), the channels last."""
    return np.moveaxis(~(x.detach().cpu().double().numpy() < 0), dim, -1)


def conv2d_dot(words: Tensor, weight_words: Tensor, case: ConvCase) -> Tensor:
    """The integer dot products (N, Cout, OH, OW) of a case, by int64 sums over the taps."""
    x = np.moveaxis(unpack(words, case.channels), -1, 1)
    w = np.moveaxis(unpack(weight_words, case.channels // case.groups), -1, 1)
    top, bottom, left, right = case.pad4
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=case.pad_value)
    n, cout, oh, ow = case.output_shape
    per_group, dot = cout // case.groups, np.zeros(case.output_shape, np.int64)
    (sh, sw), (dh, dw) = ((v[0], v[-1]) for v in (case.stride, case.dilation))
    for i in range(case.kernel[0]):
        for j in range(case.kernel[1]):
            tap = x[:, :, i * dh : i * dh + (oh - 1) * sh + 1 : sh,
                    j * dw : j * dw + (ow - 1) * sw + 1 : sw]
            for g in range(case.groups):
                outs = slice(g * per_group, (g + 1) * per_group)
                ins = slice(g * w.shape[1], (g + 1) * w.shape[1])
                dot[:, outs] += np.einsum("nchw,oc->nohw", tap[:, ins], w[outs, :, i, j])
    return torch.from_numpy(dot.astype(np.int32))


def linear_dot(words: Tensor, weight_words: Tensor, channels: int) -> Tensor:
    dot = unpack(words, channels) @ unpack(weight_words, channels).T
    return torch.from_numpy(np.asarray(dot, dtype=np.int32))


def derivative(x: Tensor, estimator: str, clip: float | None, beta: float) -> Tensor:
    """d sign(x) / dx as each straight-through estimator defines it."""
    if estimator == "ste_sign" and clip is not None:
        return (x.abs() <= clip).to(x.dtype)
    if estimator == "approx_sign":
        return torch.where(x.abs() <= 1, 2 - 2 * x.abs(), 0.0)
    if estimator == "swish_sign":
        return beta * (2 - beta * x * torch.tanh(beta * x / 2)) / (1 + torch.cosh(beta * x))
    return torch.full_like(x, 0.0 if estimator == "none" else 1.0)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, estimator, clip, beta):
        ctx.save_for_backward(x)
        ctx.conf = estimator, clip, beta
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * derivative(ctx.saved_tensors[0], *ctx.conf), None, None, None


class _ScaleStraight(torch.autograd.Function):
    """signs * scale whose gradient to the signs leaves the scale out (ReActNet's rule)."""

    @staticmethod
    def forward(ctx, signs, scale):
        ctx.save_for_backward(signs)
        return signs * scale

    @staticmethod
    def backward(ctx, grad):
        signs, = ctx.saved_tensors
        return grad, (grad * signs).flatten(1).sum(1).view(-1, *[1] * (grad.dim() - 1))


def sign(x: Tensor, estimator: str = "ste_sign", clip: float | None = 1.0, beta: float = 5.0):
    """sign(x) with the gradient of an estimator."""
    return _Sign.apply(x, estimator, clip, beta)


def binary_weight(weight, scale, estimator="ste_sign", clip=1.0, beta=5.0, scale_weight_grad=True):
    """sign(weight) times the scale of its output channel."""
    signs = sign(weight, estimator, clip, beta)
    if scale is None:
        return signs
    rows = scale.view(-1, *[1] * (weight.dim() - 1))
    return signs * rows if scale_weight_grad else _ScaleStraight.apply(signs, rows)


def padded_conv2d(x, weight, bias, case: ConvCase):
    """F.conv2d with a case's four-sided padding of a value."""
    top, bottom, left, right = case.pad4
    x = F.pad(x, (left, right, top, bottom), value=float(case.pad_value))
    return F.conv2d(x, weight, bias, case.stride, 0, case.dilation, case.groups)


def rprelu(x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    columns = [v.view(-1, *[1] * (x.dim() - 2)) for v in (shift_in, slope, shift_out)]
    y = x + columns[0]
    return torch.where(y > 0, y, columns[1] * y) + columns[2]


def residual_block(input, weight, residual=None, sign_shift=None, norm_weight=None, norm_bias=None,
                   shift_in=None, slope=None, shift_out=None, *, case: ConvCase, relu=False,
                   eps=1e-5, scale=None, input_estimator="ste_sign", input_clip=1.0,
                   weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True):
    """(output, batch mean, unbiased batch variance) of a residual block, layer by layer."""

    def channels(t: Tensor) -> Tensor:
        return t.view(-1, 1, 1)

    x = input if sign_shift is None else input + channels(sign_shift)
    x = sign(x, input_estimator, input_clip, beta)
    w = binary_weight(weight, scale, weight_estimator, weight_clip, beta, scale_weight_grad)
    y = padded_conv2d(x, w, None, case)
    y = y.relu() if relu else y
    mean, variance = y.mean((0, 2, 3)), y.transpose(0, 1).flatten(1).var(1)
    if norm_weight is None and norm_bias is not None:
        norm_weight = torch.ones_like(norm_bias)  # torch 2.11's CUDA kernel fails without it
    y = F.batch_norm(y, None, None, norm_weight, norm_bias, True, 0.0, eps)
    y = y + (input if residual is None else residual)
    y = y if shift_in is None else y + channels(shift_in)
    y = y if slope is None else F.prelu(y, slope)
    y = y if shift_out is None else y + channels(shift_out)
    return y, mean.detach(), variance.detach()
