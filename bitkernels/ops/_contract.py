"""The numeric contract in plain PyTorch, for any device: what the references are written in.

A reference is the specification of its operator, which every backend must equal bit for bit, the
oracle of the tests and what runs where no faster backend is registered. It gets checked arguments.

  sign     bit 1 = +1 = not (x < 0): 0, -0.0 and NaN are +1 (Larq's rule).
  words    32 signs in an int32, least significant bit first, channels last, tail bits 0.
  dot      K_valid - 2 popcount(a xor w), exact in int32; here a convolution of +-1 in real numbers.
  padding  0 contributes nothing (K_valid counts taps inside the image); +-1 are ordinary values.
  epilogue float32, in the order of `epilogue` below, one rounding per step, no fused multiply-add.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.ops.geometry import TILE, padding4, word_count


def sign(x: Tensor) -> Tensor:
    """+1 where not (x < 0), else -1, in x's dtype."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans (..., C) to int32 words (..., ceil(C/32))."""
    channels = bits.shape[-1]
    bits = F.pad(bits, (0, word_count(channels) * 32 - channels))
    weights = torch.arange(32, device=bits.device, dtype=torch.int64)
    words = (bits.unflatten(-1, (-1, 32)).long() << weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_bits(words: Tensor, channels: int) -> Tensor:
    """int32 words (..., ceil(C/32)) to booleans (..., C)."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :channels].bool()


def signs(words: Tensor, channels: int, dtype=torch.float32, dim: int = -1) -> Tensor:
    """Words to -1 and +1, their channels moved to `dim`."""
    return (unpack_bits(words.contiguous(), channels).to(dtype) * 2 - 1).movedim(-1, dim)


def wide(x: Tensor) -> Tensor:
    """The type arithmetic runs in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def shifted(input: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    """input + shift in the wide type, channels last; shift as `_checks.check_shift` takes it."""
    x = wide(input.movedim(dim, -1))
    if shift is None:
        return x
    return x + (shift if shift.dim() == 1 else shift.movedim(dim, -1)).to(x.dtype)


def untile_weight(tiles: Tensor, out_channels: int, groups: int = 1) -> Tensor:
    grouped = tiles.movedim(-1, 1).unflatten(0, (groups, -1)).flatten(1, 2)
    return grouped[:, : out_channels // groups].flatten(0, 1)


def canonical(weight_words: Tensor, ndim: int, out_channels: int | None, groups: int) -> Tensor:
    if weight_words.dim() == ndim:
        return weight_words
    cout = weight_words.shape[0] * TILE if out_channels is None else out_channels
    return untile_weight(weight_words, cout, groups)


def exact_dtype(t: Tensor, products: int) -> torch.dtype:
    """A real type in which the library's sum of `products` +-1 is within 1/2 of the integer."""
    return torch.float64 if t.device.type == "cuda" or products > 2**20 else torch.float32


def dot_conv2d(words, weight_words, channels, stride, padding, dilation, groups, pad_value):
    """Integer dot products (N, Cout, OH, OW) in int32."""
    dtype = exact_dtype(words, channels // groups * weight_words.shape[1:3].numel())
    a = signs(words, channels, dtype, dim=1)
    w = signs(weight_words, channels // groups, dtype, dim=1)
    top, bottom, left, right = padding4("packed_conv2d", padding)
    a = F.pad(a, (left, right, top, bottom), value=float(pad_value))
    # oneDNN's convolution is wrong for one channel in channels-last strides (torch 2.13, CPU).
    a, w = (t.contiguous().view(-1).view(t.shape) for t in (a, w))
    filters = w if len(w) else w.new_zeros(groups, *w.shape[1:])  # the library refuses none
    dot = F.conv2d(a, filters, None, stride, 0, dilation, groups)
    return dot[:, : len(w)].round().int()


def _float32(bound: float | None) -> float | None:
    """A bound beyond float32 is infinite there; `clamp` refuses it."""
    if bound is None or not abs(bound) > torch.finfo(torch.float32).max:
        return bound
    return math.copysign(math.inf, bound)


def epilogue(dot: Tensor, channel_dim: int, *, clamp_min=None, clamp_max=None, scale=None,
             bias=None, residual=None, shift_in=None, slope=None, shift_out=None) -> Tensor:
    """clamp -> scale and bias -> residual -> RPReLU, in float32, on int32 dot products."""

    def per_channel(t: Tensor) -> Tensor:
        return t.float().view([-1 if d == channel_dim else 1 for d in range(dot.dim())])

    y = dot.float()
    if clamp_min is not None or clamp_max is not None:
        y = y.clamp(_float32(clamp_min), _float32(clamp_max))
    if scale is not None:
        y = y * per_channel(scale)
    if bias is not None:
        y = y + per_channel(bias)
    if residual is not None:
        y = y + residual.float()
    if slope is not None:
        if shift_in is not None:
            y = y + per_channel(shift_in)
        y = torch.where(y > 0, y, y * per_channel(slope))
        if shift_out is not None:
            y = y + per_channel(shift_out)
    return y


def outputs(dot: Tensor, channel_dim: int, real: bool, packed: bool, dtype, sign_shift, threshold,
             **parts) -> tuple[Tensor | None, Tensor | None]:
    if threshold is not None:
        d = dot.movedim(channel_dim, -1)
        return None, pack_bits((d >= threshold[0]) & (d <= threshold[1]))
    if dtype == torch.int32:
        return dot, pack_bits((dot >= 0).movedim(channel_dim, -1)) if packed else None
    y = epilogue(dot, channel_dim, **parts)
    words = pack_bits(~(shifted(y, sign_shift, channel_dim) < 0)) if packed else None
    return (y.to(dtype or torch.float32) if real else None), words


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped to broadcast over (N, C, ...), in the type arithmetic on `like` runs in."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return vector.to(wide).view(-1, *[1] * (like.dim() - 2))


def as_rows(t: Tensor) -> Tensor:
    empty = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    return empty.copy_(t)


def estimator_grad(grad: Tensor, x: Tensor, name: str, clip: float | None, beta: float) -> Tensor:
    """grad times the estimator's derivative at x; `x` real, any shape; result in grad's dtype."""
    if name == "identity":
        return grad
    if name == "ste_sign":
        if clip is None:
            return grad
        # In the type that sign_pack_mask compares in, so that both operands follow one rule.
        return torch.where(wide(x).abs() <= clip, grad, torch.zeros_like(grad))
    if name == "approx_sign":
        magnitude = x.abs()
        product = (grad * (2 - 2 * magnitude)).to(grad.dtype)
        return torch.where(magnitude <= 1, product, torch.zeros_like(grad))  # x NaN: 0
    bx = beta * x
    slope = beta * (2 - bx * torch.tanh(bx / 2)) / (1 + torch.cosh(bx))
    # Past |bx| = 80 it is below 1e-32, and cosh is near overflow; NaN falls there too.
    slope = torch.where(bx.abs() < 80, slope, torch.zeros_like(x))
    return (grad * slope).to(grad.dtype)
