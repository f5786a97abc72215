"""packed_conv_transpose2d: transposed convolution of words, by its phases (`_phases.py`).

Each phase of the output is a `packed_conv2d` of the words with some taps of the filters, on the
backend that the device has, and writes every stride-th pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels.ops import _epilogue
from bitkernels.ops._checks import check_same_device, describe, fail
from bitkernels.ops._contract import exact_dtype, outputs, signs
from bitkernels.ops._phases import Phase, phases, transposed_geometry
from bitkernels.ops._record import Call, Operator, Sample, define, images
from bitkernels.ops.geometry import check_groups, check_words, empty_real

ops = torch.ops.bitkernels


def check(words, weight_words, channels, stride=(1,), padding=(0,), output_padding=(0,), groups=1,
          dilation=(1,), *, scale=None, bias=None, dtype=None, channels_last=True):
    op = "packed_conv_transpose2d"
    check_words(op, "words", words, channels, 4)
    check_groups(op, channels, weight_words.shape[0] if weight_words.dim() else 1, groups)
    check_words(op, "weight_words", weight_words, channels // groups, 4)
    check_same_device(op, words, weight_words=weight_words)
    cout, *kernel = weight_words.shape[:3]
    if min(cout, *kernel) < 1:
        fail(op, "weight_words", "of at least one channel and tap", describe(weight_words))
    size, *axes = transposed_geometry(op, "words", words.shape[1:3], kernel, stride, padding,
                                      output_padding, dilation)
    _epilogue.check(op, words, (words.shape[0], cout, *size), cout, scale=scale, bias=bias,
                   dtype=dtype)
    stride, padding, output_padding, dilation = axes
    return Call((words, weight_words, channels, stride, padding, output_padding, groups, dilation),
                dict(scale=scale, bias=bias, dtype=dtype, channels_last=channels_last))


def _size(words, weight_words, stride, padding, output_padding, dilation):
    return transposed_geometry("packed_conv_transpose2d", "words", words.shape[1:3],
                               weight_words.shape[1:3], stride, padding, output_padding,
                               dilation)[0]


def fake(words, weight_words, channels, stride, padding, output_padding, groups, dilation, *,
         dtype, channels_last, **_):
    size = _size(words, weight_words, stride, padding, output_padding, dilation)
    return empty_real(words, (words.shape[0], weight_words.shape[0], *size), dtype, channels_last)


def composed(words, weight_words, channels, stride, padding, output_padding, groups, dilation, *,
             scale, bias, dtype, channels_last):
    size = _size(words, weight_words, stride, padding, output_padding, dilation)
    every = phases2d(weight_words.shape[1:3], stride, padding, output_padding, dilation)
    return by_phases(words, phase_filters(weight_words, every), every, channels,
                     (weight_words.shape[0], *size), stride, groups, scale, bias,
                     dtype or torch.float32, channels_last)


def reference(words, weight_words, channels, stride=(1,), padding=(0,),
              output_padding=(0,), groups=1, dilation=(1,), *, scale=None, bias=None,
              dtype=None, channels_last=True):
    exact = exact_dtype(words, channels // groups * weight_words[0, :, :, 0].numel())
    w = signs(weight_words, channels // groups, exact, dim=1)
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # input channels first
    a, w = (t.contiguous().view(-1).view(t.shape) for t in (signs(words, channels, exact, 1), w))
    dot = F.conv_transpose2d(a, w, None, stride, padding, output_padding, groups, dilation)
    y, _ = outputs(dot.round().int(), 1, True, False, dtype, None, None, scale=scale, bias=bias)
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=format).copy_(y)


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


def _span(phase: Phase, size: int) -> tuple[slice, int, int] | None:
    """The inputs that a phase reads along one axis, and how many zeros go before and after; None if
    it reads zeros alone."""
    end = size + phase.end
    if end <= 0 or phase.start >= size:
        return None
    return (slice(max(phase.start, 0), size + min(phase.end, 0)), max(-phase.start, 0),
            max(phase.end, 0))


def samples(v):
    conv = v.words(2, 5, 6, 37), v.words(19, 3, 3, 37), 37
    return [Sample(conv),
            Sample((*conv, (2, 3), (0, 1), (1, 0), 1, (1, 2)),
                   dict(scale=v.real(19), bias=v.real(19), dtype=torch.float16,
                        channels_last=False))]


define(Operator(
    # Filters by output channel, as of packed_conv2d; never tiled.
    schemas=("packed_conv_transpose2d(Tensor words, Tensor weight_words, SymInt channels, "
             "int[2] stride=1, int[2] padding=0, int[2] output_padding=0, int groups=1, "
             "int[2] dilation=1, *, Tensor? scale=None, Tensor? bias=None, "
             f"{_epilogue.REAL_OUT}, bool channels_last=True) -> Tensor",),
    group="Products of bits", check=check, fake=fake, composed=composed,
    reference=reference, samples=samples,
    batched=images("words"), engine=False,
    text=f"""
Transposed convolution of packed activations with packed filters: dot products of signs, exact in
int32, times scale plus bias in float32. Runs packed_conv2d for each phase of the output.

Arguments:
  words: int32 (N, H, W, ceil(channels / 32)), the packed input.
  weight_words: int32 (Cout, kh, kw, ceil(channels / groups / 32)), by output channel as of
    packed_conv2d; not tiled.
  channels: of the input; words alone cannot tell.
  stride: one or two integers, at least 1.
  padding: one or two integers, at least 0: rows and columns taken away at each side.
  output_padding: one or two integers, smaller than stride or dilation: rows and columns more.
  groups: a divisor of the input's and the output's channels.
  dilation: one or two integers, at least 1.
  scale: (Cout,) real, a factor.
  bias: (Cout,) real, added after scale.
{_epilogue.OUTPUTS_TEXT}  channels_last: the memory format of the output.
Returns:
  real (N, Cout, OH, OW), sizes as of binary_conv_transpose2d.
Errors:
  those of packed_conv2d; an output without pixels; an argument that requires a gradient: there is
  none, binary_conv_transpose2d trains.
Example:
  >>> x, weight = torch.randn(1, 64, 4, 4), torch.randn(64, 40, 3, 3)
  >>> words, filters = ops.sign_pack(x, dim=1), ops.sign_pack(weight.transpose(0, 1), dim=1)
  >>> y = ops.packed_conv_transpose2d(words, filters, 64, stride=2, padding=1)
  >>> sign = lambda t: torch.where(t < 0, -1.0, 1.0)
  >>> torch.equal(y, F.conv_transpose2d(sign(x), sign(weight), stride=2, padding=1))
  True
"""))
