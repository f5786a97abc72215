"""Reference implementation: the numeric contract in plain PyTorch, for any device.

It is the specification that every backend must equal bit for bit, the oracle of the tests and what
runs where no faster backend is registered. Arguments are already checked (`_checks.py`).

  sign     bit 1 = +1 = not (x < 0): 0, -0.0 and NaN are +1 (Larq's rule).
  words    32 signs in an int32, least significant bit first, channels last, tail bits 0.
  dot      K_valid - 2 popcount(a xor w), exact in int32; here a convolution of +-1 in real numbers.
  padding  0 contributes nothing (K_valid counts taps inside the image); +-1 are ordinary values.
  epilogue float32, in the order of `epilogue` below, one rounding per step, no fused multiply-add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels._checks import TILE, padding4, pool_geometry, word_count


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


def _wide(x: Tensor) -> Tensor:
    """The type arithmetic runs in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _shifted(input: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    """input + shift in the wide type, channels last; shift as `_checks.check_shift` takes it."""
    x = _wide(input.movedim(dim, -1))
    if shift is None:
        return x
    return x + (shift if shift.dim() == 1 else shift.movedim(dim, -1)).to(x.dtype)


def sign_pack(input: Tensor, shift: Tensor | None = None, dim: int = -1) -> Tensor:
    return pack_bits(~(_shifted(input, shift, dim) < 0))


def sign_pack_mask(input: Tensor, clip: float, shift: Tensor | None = None, dim: int = -1):
    """Signs of input + shift and its straight-through mask |input + shift| <= clip, both packed."""
    x = _shifted(input, shift, dim)
    return pack_bits(~(x < 0)), pack_bits(x.abs() <= clip)


def mask_grad(grad: Tensor, mask_words: Tensor, dim: int = -1) -> Tensor:
    """grad where its mask bit is set, else 0."""
    mask = unpack_bits(mask_words, grad.shape[dim]).movedim(-1, dim)
    return torch.where(mask, grad, torch.zeros_like(grad))


def unpack(words: Tensor, channels: int, dtype=torch.float32, dim: int = -1) -> Tensor:
    return (unpack_bits(words.contiguous(), channels).to(dtype) * 2 - 1).movedim(-1, dim)


def tile_weight(weight_words: Tensor, groups: int = 1) -> Tensor:
    """(Cout, ..., words) to (tiles, ..., words, 16): 16 output channels innermost, 0-padded."""
    grouped = weight_words.unflatten(0, (groups, -1))
    per_group = grouped.shape[1]
    padding = [0, 0] * (weight_words.dim() - 1) + [0, -per_group % TILE]
    tiles = F.pad(grouped, padding).unflatten(1, (-1, TILE)).flatten(0, 1)
    return tiles.movedim(1, -1).contiguous()


def untile_weight(tiles: Tensor, out_channels: int, groups: int = 1) -> Tensor:
    grouped = tiles.movedim(-1, 1).unflatten(0, (groups, -1)).flatten(1, 2)
    return grouped[:, : out_channels // groups].flatten(0, 1)


def _canonical(weight_words: Tensor, ndim: int, out_channels: int | None, groups: int) -> Tensor:
    if weight_words.dim() == ndim:
        return weight_words
    cout = weight_words.shape[0] * TILE if out_channels is None else out_channels
    return untile_weight(weight_words, cout, groups)


def _exact_dtype(t: Tensor, products: int) -> torch.dtype:
    """A real type in which the library's sum of `products` +-1 is within 1/2 of the integer."""
    return torch.float64 if t.device.type == "cuda" or products > 2**20 else torch.float32


def dot_conv2d(words, weight_words, channels, stride, padding, dilation, groups, pad_value):
    """Integer dot products (N, Cout, OH, OW) in int32."""
    dtype = _exact_dtype(words, channels // groups * weight_words.shape[1:3].numel())
    a = unpack(words, channels, dtype, dim=1)
    w = unpack(weight_words, channels // groups, dtype, dim=1)
    top, bottom, left, right = padding4("packed_conv2d", padding)
    a = F.pad(a, (left, right, top, bottom), value=float(pad_value))
    # oneDNN's convolution is wrong for one channel in channels-last strides (torch 2.13, CPU).
    a, w = (t.contiguous().view(-1).view(t.shape) for t in (a, w))
    filters = w if len(w) else w.new_zeros(groups, *w.shape[1:])  # the library refuses none
    dot = F.conv2d(a, filters, None, stride, 0, dilation, groups)
    return dot[:, : len(w)].round().int()


def epilogue(dot: Tensor, channel_dim: int, *, clamp_min=None, clamp_max=None, scale=None,
             bias=None, residual=None, shift_in=None, slope=None, shift_out=None) -> Tensor:
    """clamp -> scale and bias -> residual -> RPReLU, in float32, on int32 dot products."""

    def per_channel(t: Tensor) -> Tensor:
        return t.float().view([-1 if d == channel_dim else 1 for d in range(dot.dim())])

    y = dot.float()
    if clamp_min is not None or clamp_max is not None:
        y = y.clamp(clamp_min, clamp_max)
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


def _outputs(dot: Tensor, channel_dim: int, real: bool, packed: bool, dtype, sign_shift, threshold,
             **parts) -> tuple[Tensor | None, Tensor | None]:
    if threshold is not None:
        d = dot.movedim(channel_dim, -1)
        return None, pack_bits((d >= threshold[0]) & (d <= threshold[1]))
    if dtype == torch.int32:
        return dot, pack_bits((dot >= 0).movedim(channel_dim, -1)) if packed else None
    y = epilogue(dot, channel_dim, **parts)
    words = sign_pack(y, sign_shift, channel_dim) if packed else None
    return (y.to(dtype or torch.float32) if real else None), words


def packed_conv2d(words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,), groups=1,
                  *, pad_value=0, out_channels=None, dtype=None, channels_last=True,
                  sign_shift=None, threshold=None, real=True, packed=False, **parts):
    """(real tensor or None, packed signs or None) as `real` and `packed` ask."""
    weight_words = _canonical(weight_words, 4, out_channels, groups)
    dot = dot_conv2d(words, weight_words, channels, stride, padding, dilation, groups, pad_value)
    y, signs = _outputs(dot, 1, real, packed, dtype, sign_shift, threshold, **parts)
    if y is not None:
        format = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=format).copy_(y)
    return y, signs


def packed_conv_transpose2d(words, weight_words, channels, stride=(1,), padding=(0,),
                            output_padding=(0,), groups=1, dilation=(1,), *, scale=None, bias=None,
                            dtype=None, channels_last=True):
    exact = _exact_dtype(words, channels // groups * weight_words[0, :, :, 0].numel())
    w = unpack(weight_words, channels // groups, exact, dim=1)
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # input channels first
    a, w = (t.contiguous().view(-1).view(t.shape) for t in (unpack(words, channels, exact, 1), w))
    dot = F.conv_transpose2d(a, w, None, stride, padding, output_padding, groups, dilation)
    y, _ = _outputs(dot.round().int(), 1, True, False, dtype, None, None, scale=scale, bias=bias)
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=format).copy_(y)


def packed_linear(words, weight_words, channels, *, out_channels=None, dtype=None, sign_shift=None,
                  threshold=None, real=True, packed=False, **parts):
    weight_words = _canonical(weight_words, 2, out_channels, 1)
    a = unpack(words, channels, _exact_dtype(words, channels))
    dot = (a @ unpack(weight_words, channels, a.dtype).T).round().int()
    return _outputs(dot, dot.dim() - 1, real, packed, dtype, sign_shift, threshold, **parts)


def packed_max_pool2d(words, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    """Maximum of signs = or of bits; padding never wins, as in `nn.MaxPool2d`."""
    kernel, stride, padding, dilation, size = pool_geometry(
        words, kernel_size, stride, padding, dilation, ceil_mode)
    if words.shape[-1] == 0:  # which the library refuses
        return words.new_empty(words.shape[0], *size, 0)
    bits = unpack_bits(words, words.shape[-1] * 32).movedim(-1, 1).float()
    most = F.max_pool2d(bits, kernel, stride, padding, dilation, ceil_mode)
    return pack_bits((most > 0).movedim(1, -1))  # -inf where a window holds padding alone


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped to broadcast over (N, C, ...), in the type arithmetic on `like` runs in."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return vector.to(wide).view(-1, *[1] * (like.dim() - 2))


def rsign(input: Tensor, shift: Tensor) -> Tensor:
    return sign(_shifted(input, shift, 1).movedim(-1, 1)).to(input.dtype)


def rprelu(input: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor) -> Tensor:
    y = _wide(input) + per_channel(shift_in, input)
    y = torch.where(y > 0, y, y * per_channel(slope, input)) + per_channel(shift_out, input)
    return y.to(input.dtype)


def rprelu_backward(grad: Tensor, input: Tensor, shift_in: Tensor, slope: Tensor):
    """Gradients of (input, shift_in, slope, shift_out); the vectors' are float32."""
    y = _wide(input) + per_channel(shift_in, input)
    g = grad.to(y.dtype)
    grad_input = torch.where(y > 0, g, g * per_channel(slope, input))
    reduce = [d for d in range(input.dim()) if d != 1]
    grad_slope = torch.where(y > 0, torch.zeros_like(g), g * y).sum(reduce)
    return (grad_input.to(input.dtype), grad_input.sum(reduce).float(), grad_slope.float(),
            g.sum(reduce).float())


def packed_conv2d_moments(words, weight_words, channels, stride, padding, dilation, groups, *,
                          pad_value, out_channels, relu, dtype):
    """Dot products in `dtype`, channels-last; their sums, sums of squares and count: (3, Cout)."""
    weight_words = _canonical(weight_words, 4, out_channels, groups)
    dot = dot_conv2d(words, weight_words, channels, stride, padding, dilation, groups, pad_value)
    d = (dot.relu() if relu else dot).long()
    moments = torch.stack([t.sum((0, 2, 3)) for t in (d, d * d, torch.ones_like(d))])
    return _rows(dot.to(dtype)), moments


def _rows(t: Tensor) -> Tensor:
    empty = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
    return empty.copy_(t)


def _value(dot: Tensor, like: Tensor, scale, bias, residual, shift_in, relu: bool) -> Tensor:
    """What the block's activation sees, in the type arithmetic on `like` runs in."""
    d = dot.relu() if relu else dot
    y = d.to(_wide(like).dtype) * per_channel(scale, like) + per_channel(bias, like)
    y = y + _wide(residual)
    return y if shift_in is None else y + per_channel(shift_in, like)


def residual_block_forward(dot, residual, scale, bias, shift_in, slope, shift_out, relu):
    """RPReLU(dot * scale + bias + residual), of max(dot, 0) with relu; without slope no PReLU."""
    y = _value(dot, residual, scale, bias, residual, shift_in, relu)
    if slope is not None:
        y = torch.where(y > 0, y, y * per_channel(slope, residual))
    if shift_out is not None:
        y = y + per_channel(shift_out, residual)
    return _rows(y.to(residual.dtype))


def residual_block_backward(grad, dot, residual, scale, bias, shift_in, slope, center, relu):
    """Gradient of the value under the activation, and float64 sums (4, C) over all but channels.

    The sums are of that gradient, of it times (dot - center) (of max(dot, 0) with relu), of the
    slope's gradient, and of grad. Without slope the gradient is grad itself: empty(0) is returned,
    and the last two sums are 0.
    """
    g = _wide(grad)
    d = (dot.relu() if relu else dot).to(g.dtype) - per_channel(center, g)
    sums = [torch.zeros(d.shape[1], dtype=torch.float64, device=d.device)] * 4
    out = grad.new_empty(0)
    if slope is not None:
        y = _value(dot, grad, scale, bias, residual, shift_in, relu)
        sums[2:] = (t.double().sum((0, 2, 3)) for t in (torch.where(y > 0, 0.0, g * y), g))
        g = torch.where(y > 0, g, g * per_channel(slope, g))
        out = _rows(g.to(grad.dtype))
    sums[:2] = (t.double().sum((0, 2, 3)) for t in (g, g * d))
    return out, torch.stack(sums)


def residual_block_norm_backward(grad, dot, p, q, r, center, relu, dtype):
    """p grad + q (dot - center) + r per channel; with relu of max(dot, 0), and 0 where dot <= 0."""
    g = _wide(grad)
    d = (dot.relu() if relu else dot).to(g.dtype) - per_channel(center, g)
    out = g * per_channel(p, g) + d * per_channel(q, g) + per_channel(r, g)
    return _rows((torch.where(dot > 0, out, 0.0) if relu else out).to(dtype))


def sign_backward(grad, input, shift, add, estimator, clip, beta):
    """grad times the estimator's slope at input + shift, plus add; float64 sums of the product."""
    x, g = _wide(input), _wide(grad)
    if shift is not None:
        x = x + per_channel(shift, input)
    g = estimator_grad(g, x, estimator, clip, beta)
    total = g if add is None else g + _wide(add)
    return total.to(input.dtype), g.double().sum([d for d in range(g.dim()) if d != 1])


def packed_conv2d_weight_grad(grad, words, channels, kernel_size, stride, pad, dilation, pad_value):
    """Gradient (Cout, channels, kh, kw) of the weight's signs, float32, channels-last."""
    if grad.shape[1] == 0:  # which the library refuses
        return grad.new_empty(0, channels, *kernel_size, dtype=torch.float32)
    top, bottom, left, right = pad
    grad = _wide(grad)
    x = F.pad(unpack(words, channels, grad.dtype, dim=1), (left, right, top, bottom),
              value=float(pad_value))
    weight = grad.new_empty((grad.shape[1], channels, *kernel_size))
    _, out, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, (0, 0), dilation, False, (0, 0), 1, (False, True, False))
    return _rows(out.float())


def packed_conv2d_input_grad(grad, weight_words, channels, scale, input_size, pad, dilation):
    """Gradient (N, channels, *input_size) of the input of a convolution of stride 1."""
    if grad.shape[1] == 0:  # a sum of nothing, which the library refuses
        return _rows(grad.new_zeros(grad.shape[0], channels, *input_size))
    top, bottom, left, right = pad
    weight = unpack(weight_words, channels, grad.dtype, dim=1)
    if scale is not None:
        weight = weight * scale.view(-1, 1, 1, 1).to(grad.dtype)
    height, width = input_size[0] + top + bottom, input_size[1] + left + right
    x = grad.new_empty((grad.shape[0], channels, height, width))
    out, _, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (0, 0), dilation, False, (0, 0), 1, (True, False, False))
    return _rows(out[:, :, top : top + input_size[0], left : left + input_size[1]])


def estimator_grad(grad: Tensor, x: Tensor, name: str, clip: float | None, beta: float) -> Tensor:
    """grad times the estimator's derivative at x; `x` real, any shape; result in grad's dtype."""
    if name == "identity":
        return grad
    if name == "ste_sign":
        if clip is None:
            return grad
        # In the type that sign_pack_mask compares in, so that both operands follow one rule.
        return torch.where(_wide(x).abs() <= clip, grad, torch.zeros_like(grad))
    if name == "approx_sign":
        magnitude = x.abs()
        product = (grad * (2 - 2 * magnitude)).to(grad.dtype)
        return torch.where(magnitude <= 1, product, torch.zeros_like(grad))  # x NaN: 0
    bx = beta * x
    slope = beta * (2 - bx * torch.tanh(bx / 2)) / (1 + torch.cosh(bx))
    # Past |bx| = 80 it is below 1e-32, and cosh is near overflow; NaN falls there too.
    slope = torch.where(bx.abs() < 80, slope, torch.zeros_like(x))
    return (grad * slope).to(grad.dtype)
