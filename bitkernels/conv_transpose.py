"""The differentiable transposed convolution of signs, by its phases (`bitkernels._transposed`).

The input is packed once; each phase of the output is a convolution of the words with some taps of
the filters, and writes every stride-th pixel. For the backward it keeps what `binary_conv2d` keeps:
packed signs, and what the sign's estimator needs. The real part of the backward is PyTorch's own,
on operands expanded from the bits.

Filters of a transposed convolution have the input's channels first, (Cin, Cout / groups, kh, kw).
Words, scale and gradients are by output channel, (Cout, Cin / groups, kh, kw), as in all other
operators: `by_output` turns one into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitkernels._checks import wants_channels_last
from bitkernels._ops import LIB, empty_real
from bitkernels._transposed import Phase, check_binary_conv_transpose2d, phases
from bitkernels.autograd import (
    _below_autograd,
    _needs_grad,
    _scaled_signs,
    _Signs,
    _wanted,
    autocast,
    finish_weight_grad,
    memory_format,
)

ops = torch.ops.bitkernels


def by_output(weight: Tensor, groups: int) -> Tensor:
    """(Cin, Cout / groups, ...) to (Cout, Cin / groups, ...), and back."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def pack_filters(weight: Tensor, groups: int) -> Tensor:
    """(Cin, Cout / groups, kh, kw) to words (Cout, kh, kw, ceil(Cin / groups / 32))."""
    return ops.sign_pack.default(weight.unflatten(0, (groups, -1)), None, 1).flatten(0, 1)


def phases2d(kernel, stride, padding, output_padding, dilation) -> list[tuple[Phase, Phase]]:
    """(vertical, horizontal) of each phase."""
    rows, columns = (phases(*axis) for axis in zip(kernel, stride, padding, output_padding,
                                                   dilation, strict=True))
    return [(v, h) for v in rows for h in columns]


def phase_filters(weight_words: Tensor, every: list[tuple[Phase, Phase]]) -> list[Tensor | None]:
    """Each phase's own filters, as `packed_conv2d` takes them; None without taps."""
    return [None if v.taps is None or h.taps is None
            else weight_words[:, v.taps, h.taps].flip(1, 2) for v, h in every]


def conv_transpose2d_on_words(words: Tensor, filters, every, channels: int, out_channels: int,
                              size, stride, groups: int, scale, bias, dtype: torch.dtype,
                              channels_last: bool) -> Tensor:
    """(N, Cout, *size) of words (N, H, W, words); filters are `phase_filters`, or tiled ones."""

    def part(phase: tuple[Phase, Phase], filter: Tensor | None) -> Tensor | None:
        v, h = phase
        rows, columns = _span(v, words.shape[1]), _span(h, words.shape[2])
        if filter is None or rows is None or columns is None:
            return None
        return ops.packed_conv2d.default(
            words[:, rows[0], columns[0]], filter, channels, (1, 1), (*rows[1:], *columns[1:]),
            (v.dilation, h.dilation), groups, out_channels=out_channels, scale=scale, bias=bias,
            dtype=dtype, channels_last=channels_last)

    if len(every) == 1:
        whole = part(every[0], filters[0])
        if whole is not None:
            return whole
    out = empty_real(words, (words.shape[0], out_channels, *size), dtype, channels_last)
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


def _span(phase: Phase, size: int) -> tuple[slice, int, int] | None:
    """The inputs that a phase reads along one axis, and how many zeros go before and after; None if
    it reads zeros alone."""
    end = size + phase.end
    if end <= 0 or phase.start >= size:
        return None
    return (slice(max(phase.start, 0), size + min(phase.end, 0)), max(-phase.start, 0),
            max(phase.end, 0))


class _BinaryConvTranspose2d(torch.autograd.Function):
    @staticmethod
    def forward(input, weight, bias, scale, conf):
        clip = conf["input_clip"] if conf["input_estimator"] == "ste_sign" else None
        with _below_autograd():
            if clip is None:
                words, mask = ops.sign_pack.default(input, None, 1), None
            else:
                words, mask = ops.sign_pack_mask.default(input, clip, None, 1)
            out = _on_words(words, input, weight, bias, scale, conf)
        return out, words, mask

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, scale, conf = inputs
        _, words, saved = output
        ctx.mark_non_differentiable(*(t for t in (words, saved) if t is not None))
        if conf["input_estimator"] in ("approx_sign", "swish_sign"):
            saved = input
        ctx.save_for_backward(words, saved, weight, scale)
        ctx.conf, ctx.memory_format = conf, memory_format(input)
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        words, saved, weight, scale = ctx.saved_tensors
        conf = ctx.conf
        groups = conf["groups"]
        wants_input, wants_weight = _wanted(ctx)
        grad_input = grad_weight = grad_scale = grad_bias = None
        if wants_input or wants_weight:
            rows = by_output(weight, groups)
            weight_words = pack_filters(weight, groups)
            signs = by_output(_scaled_signs(rows, weight_words, scale, grad.dtype), groups)
            x = ops.unpack.default(words, weight.shape[0], grad.dtype, 1)
            grad_input, grad_signs, _ = torch.ops.aten.convolution_backward(
                grad.contiguous(memory_format=torch.channels_last), x, signs, None, conf["stride"],
                conf["padding"], conf["dilation"], True, conf["output_padding"], groups,
                (wants_input, wants_weight, False))
            if wants_input:
                grad_input = grad_input.to(ctx.input_dtype).contiguous(
                    memory_format=ctx.memory_format)
                grad_input = _Signs.grad(grad_input, saved, conf["input_estimator"],
                                         conf["input_clip"], conf["beta"], 1)
            if wants_weight:
                grad_weight, grad_scale = finish_weight_grad(
                    by_output(grad_signs, groups), rows, weight_words, scale, conf,
                    ctx.needs_input_grad[1], ctx.needs_input_grad[3])
            if grad_weight is not None:
                grad_weight = by_output(grad_weight, groups).contiguous(
                    memory_format=memory_format(weight))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, grad_scale, None


def _on_words(words, input, weight, bias, scale, conf) -> Tensor:
    groups, kernel = conf["groups"], weight.shape[2:]
    every = phases2d(kernel, conf["stride"], conf["padding"], conf["output_padding"],
                     conf["dilation"])
    return conv_transpose2d_on_words(
        words, phase_filters(pack_filters(weight, groups), every), every, weight.shape[0],
        weight.shape[1] * groups, conf["size"], conf["stride"], groups, scale, bias,
        conf["dtype"] or input.dtype, wants_channels_last(input, weight))


def _binary_conv_transpose2d(
        input, weight, bias=None, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
        dilation=(1,), *, scale=None, input_estimator="ste_sign", input_clip=1.0,
        weight_estimator="ste_sign", weight_clip=1.0, beta=5.0, scale_weight_grad=True, dtype=None):
    shape, stride, padding, output_padding, dilation = check_binary_conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation, scale=scale,
        input_estimator=input_estimator, input_clip=input_clip, weight_estimator=weight_estimator,
        weight_clip=weight_clip, dtype=dtype)
    conf = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups,
                dilation=dilation, size=shape[-2:], input_estimator=input_estimator,
                input_clip=input_clip, weight_estimator=weight_estimator, weight_clip=weight_clip,
                beta=beta, scale_weight_grad=scale_weight_grad, dtype=dtype)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    if _needs_grad(input, weight, bias, scale):
        out = _BinaryConvTranspose2d.apply(batched, weight, bias, scale, conf)[0]
    else:
        with _below_autograd():
            words = ops.sign_pack.default(batched, None, 1)
            out = _on_words(words, batched, weight, bias, scale, conf)
    return out if input.dim() == 4 else out.squeeze(0)


for _key in ("Autograd", "CompositeExplicitAutograd"):
    LIB.impl("binary_conv_transpose2d", _binary_conv_transpose2d, _key)
for _device in ("cpu", "cuda"):
    LIB.impl("binary_conv_transpose2d", autocast(ops.binary_conv_transpose2d.default, _device),
             f"Autocast{_device.upper()}")
