"""Transposed convolutions of signs, by their phases (`bitkernels._transposed`).

Each phase of the output is a `packed_conv2d` of the words with some taps of the filters, on the
backend that the device has, and writes every stride-th pixel. `binary_conv_transpose2d` keeps for
its backward what `binary_conv2d` keeps: packed signs, and what the sign's estimator needs. The real
part of the backward is PyTorch's own, on operands expanded from the bits.

Filters of a transposed convolution have the input's channels first, (Cin, Cout / groups, kh, kw).
Words, scale and gradients are by output channel, (Cout, Cin / groups, kh, kw), as in all other
operators: `by_output` turns one into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import _onnx
from bitkernels._checks import wants_channels_last
from bitkernels._dispatch import (
    FirstOrder,
    autocast,
    below_autograd,
    in_memory_format,
    is_recorded,
    is_traced,
    record,
    unrecorded,
)
from bitkernels._ops import LIB, empty_real
from bitkernels._transposed import (
    Phase,
    check_binary_conv_transpose2d,
    check_packed_conv_transpose2d,
    phases,
)
from bitkernels.autograd import _Signs, _wanted, latent_grad, memory_format

ops = torch.ops.bitkernels


def by_output(weight: Tensor, groups: int) -> Tensor:
    """(Cin, Cout / groups, ...) to (Cout, Cin / groups, ...), and back."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def spread(scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A factor of each output channel, (Cout,), shaped to multiply (Cin, Cout / groups, ...)."""
    rows = scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
    return rows.view(*rows.shape, *[1] * (weight.dim() - 2))


def pack_filters(weight: Tensor, groups: int) -> Tensor:
    """(Cin, Cout / groups, kh, kw) to words (Cout, kh, kw, ceil(Cin / groups / 32))."""
    return ops.sign_pack.default(weight.unflatten(0, (groups, -1)), None, 1).flatten(0, 1)


def phases2d(kernel, stride, padding, output_padding, dilation) -> list[tuple[Phase, Phase]]:
    """(vertical, horizontal) of each phase."""
    rows, columns = (phases(*axis) for axis in zip(kernel, stride, padding, output_padding,
                                                   dilation, strict=True))
    return [(v, h) for v in rows for h in columns]


def phase_filters(weight_words: Tensor, every: list[tuple[Phase, Phase]]) -> list[Tensor]:
    """Each phase's own filters, as `packed_conv2d` takes them."""
    return [weight_words[:, v.taps, h.taps].flip(1, 2) for v, h in every]


def by_phases(words: Tensor, filters, every, channels: int, shape, stride, groups: int, scale,
              bias, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """(N, *shape) of words (N, H, W, words); filters are `phase_filters`, or tiled ones."""
    out_channels, *size = shape

    def part(phase: tuple[Phase, Phase], filter: Tensor) -> Tensor | None:
        v, h = phase
        rows, columns = _span(v, words.shape[1]), _span(h, words.shape[2])
        if rows is None or columns is None:
            return None
        return ops.packed_conv2d.default(
            words[:, rows[0], columns[0]], filter, channels, (1, 1), (*rows[1:], *columns[1:]),
            (v.dilation, h.dilation), groups, out_channels=out_channels, scale=scale, bias=bias,
            dtype=dtype, channels_last=channels_last)

    if tuple(stride) == (1, 1):
        whole = part(every[0], filters[0])
        if whole is not None:
            return whole
    out = empty_real(words, (words.shape[0], out_channels, *size), dtype, channels_last)
    if len(every) < stride[0] * stride[1]:
        out.copy_(_of_no_taps(out, scale, bias))
    for phase, filter in zip(every, filters, strict=True):
        first = phase[0].first, phase[1].first
        if first[0] < size[0] and first[1] < size[1]:
            value = part(phase, filter)
            if value is None:
                value = _of_no_taps(out, scale, bias)
            out[:, :, first[0] :: stride[0], first[1] :: stride[1]] = value
    return out


def _of_no_taps(out: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The epilogue of dot products that are 0, (Cout, 1, 1) in float32."""
    value = torch.zeros(out.shape[1], device=out.device)
    if scale is not None:
        value.mul_(scale)
    if bias is not None:
        value.add_(bias)
    return value.view(-1, 1, 1)


def _packed_conv_transpose2d(
        words, weight_words, channels, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
        dilation=(1,), *, scale=None, bias=None, dtype=None, channels_last=True):
    shape, *geometry = check_packed_conv_transpose2d(
        words, weight_words, channels, stride, padding, output_padding, groups, dilation,
        scale=scale, bias=bias, dtype=dtype)
    every = phases2d(weight_words.shape[1:3], *geometry)
    return by_phases(words, phase_filters(weight_words, every), every, channels, shape[1:],
                     geometry[0], groups, scale, bias, dtype or torch.float32, channels_last)


def _span(phase: Phase, size: int) -> tuple[slice, int, int] | None:
    """The inputs that a phase reads along one axis, and how many zeros go before and after; None if
    it reads zeros alone."""
    end = size + phase.end
    if end <= 0 or phase.start >= size:
        return None
    return (slice(max(phase.start, 0), size + min(phase.end, 0)), max(-phase.start, 0),
            max(phase.end, 0))


class _BinaryConvTranspose2d(FirstOrder):
    operator = "binary_conv_transpose2d"
    onnx = staticmethod(_onnx.binary_conv_transpose2d)

    @staticmethod
    def call(input, weight, bias, scale, conf):
        options = dict(conf)
        geometry = [options.pop(name) for name in (
            "stride", "padding", "output_padding", "groups", "dilation")]
        return ops.binary_conv_transpose2d.default(input, weight, bias, *geometry, scale=scale,
                                                   **options)

    @staticmethod
    def forward(ctx, input, weight, bias, scale, conf):
        estimator = conf["input_estimator"] if ctx.needs_input_grad[0] else "none"
        with below_autograd():
            words, saved = _Signs.pack(input, estimator, conf["input_clip"], 1)
            out = _on_words(words, input, weight, bias, scale, conf)
        ctx.save_for_backward(words, saved, weight, scale)
        ctx.conf, ctx.memory_format = conf, memory_format(input)
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        words, saved, weight, scale = ctx.saved_tensors
        conf = ctx.conf
        groups = conf["groups"]
        wants_input, wants_weight = _wanted(ctx)
        grad_input = grad_weight = grad_scale = grad_bias = None
        if wants_input or wants_weight:
            # In the weight's own memory order. Expanded from words by output channel they made this
            # backward take 238 ms for 116 (512 to 256 channels, 4x4, 14x14 image, one core of a
            # Xeon, 2026-11-27).
            signs = ops.rsign.default(weight, weight.new_zeros(weight.shape[1])).to(grad.dtype)
            scaled = signs
            if scale is not None:
                scaled = signs * spread(scale, weight, groups).to(grad.dtype)
            x = ops.unpack.default(words, weight.shape[0], grad.dtype, 1)
            grad_input, grad_signs, _ = torch.ops.aten.convolution_backward(
                in_memory_format(grad, torch.channels_last), x, scaled, None,
                conf["stride"], conf["padding"], conf["dilation"], True, conf["output_padding"],
                groups, (wants_input, wants_weight, False))
            if wants_input:
                grad_input = in_memory_format(grad_input.to(ctx.input_dtype), ctx.memory_format)
                grad_input = _Signs.grad(grad_input, saved, conf["input_estimator"],
                                         conf["input_clip"], conf["beta"], 1)
            if wants_weight:
                grad_weight, grad_scale = _finish_weight_grad(
                    grad_signs, weight, signs, scale, conf, *ctx.needs_input_grad[1::2])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None


def _finish_weight_grad(grad, weight, signs, scale, conf, wants_weight: bool, wants_scale: bool):
    """(dweight, dscale) from the gradient with respect to the unscaled signs of the weight."""
    grad_weight = grad_scale = None
    if scale is not None and wants_scale:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        per_input = (grad * signs).sum((2, 3), dtype=wide)  # (Cin, Cout / groups)
        grad_scale = per_input.unflatten(0, (conf["groups"], -1)).sum(1).flatten().to(scale.dtype)
    if wants_weight:
        factor = None if scale is None else spread(scale, weight, conf["groups"])
        grad_weight = latent_grad(grad, weight, factor, conf)
    return grad_weight, grad_scale


def _on_words(words, input, weight, bias, scale, conf) -> Tensor:
    return ops.packed_conv_transpose2d.default(
        words, pack_filters(weight, conf["groups"]), weight.shape[0], conf["stride"],
        conf["padding"], conf["output_padding"], conf["groups"], conf["dilation"], scale=scale,
        bias=bias, dtype=conf["dtype"] or input.dtype,
        channels_last=wants_channels_last(input, weight))


def _binary_conv_transpose2d(
        input, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
        dilation=(1,), *, scale=None, input_estimator="ste_sign", input_clip=1.0,
        weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True, dtype=None):
    _, stride, padding, output_padding, dilation = check_binary_conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation, scale=scale,
        input_estimator=input_estimator, input_clip=input_clip, weight_estimator=weight_estimator,
        weight_clip=weight_clip, dtype=dtype)
    conf = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups,
                dilation=dilation, input_estimator=input_estimator, input_clip=input_clip,
                weight_estimator=weight_estimator, weight_clip=weight_clip, beta=beta,
                scale_weight_grad=scale_weight_grad, dtype=dtype)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    if is_recorded("binary_conv_transpose2d", input, weight, bias, scale):
        out = record(_BinaryConvTranspose2d, (batched, weight, bias, scale), conf)
    elif is_traced():
        out = unrecorded(_BinaryConvTranspose2d, (batched, weight, bias, scale), conf)
    else:
        with below_autograd():
            words = ops.sign_pack.default(batched, None, 1)
            out = _on_words(words, batched, weight, bias, scale, conf)
    return out if input.dim() == 4 else out.squeeze(0)


LIB.impl("packed_conv_transpose2d", _packed_conv_transpose2d, "CompositeExplicitAutograd")
for _key in ("Autograd", "CompositeExplicitAutograd"):
    LIB.impl("binary_conv_transpose2d", _binary_conv_transpose2d, _key)
for _device in ("cpu", "cuda"):
    LIB.impl("binary_conv_transpose2d", autocast(ops.binary_conv_transpose2d.default, _device),
             f"Autocast{_device.upper()}")
