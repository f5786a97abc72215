"""max_pool2d_with_offsets and its backward: max pooling that names a maximum by one byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.function import Function

from bitkernels._dispatch import below_autograd, differentiate
from bitkernels.ops._checks import check_real, check_same_device, describe, fail
from bitkernels.ops._contract import wide
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, images
from bitkernels.ops.geometry import pooled_size

ops = torch.ops.bitkernels
# The offset of a window without a tap in the image, of which there are some with dilation.
NOWHERE = 255


def geometry(op, size, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    """(kernel, stride, padding, dilation, whether sizes are rounded up), checked; and (OH, OW)."""
    *found, out = pooled_size(op, size, kernel_size, stride, padding, dilation, ceil_mode)
    if found[0][0] * found[0][1] > NOWHERE:
        fail(op, "kernel_size", f"of at most {NOWHERE} taps, which a byte tells apart",
             list(found[0]))
    return (*found, ceil_mode), out


def check(input, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    op = "max_pool2d_with_offsets"
    check_real(op, "input", input, 4)
    window, _ = geometry(op, input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    return Call((input, *window))


def fake(input, *window):
    shape = (*input.shape[:2], *pooled_size("", input.shape[2:], *window)[-1])
    out = torch.empty(shape, dtype=input.dtype, device=input.device,
                      memory_format=suggest_memory_format(input))
    return out, torch.empty_like(out, dtype=torch.uint8)


def _corners(out: Tensor, stride, padding) -> list[Tensor]:
    """Row and column of the first tap of each window, also where it is padding."""
    rows, columns = (torch.arange(n, device=out.device) * s - p for n, s, p in zip(
        out.shape[2:], stride, padding, strict=True))
    return [rows.view(-1, 1), columns]


def reference(input: Tensor, kernel, stride, padding, dilation, ceil_mode):
    """PyTorch's maximum; its index in the image as the offset of a tap in its window.

    Where all of a window is -inf PyTorch has its first tap in the image, or, on GPUs in
    channels-last images, pixel 0: here it is the first tap.
    """
    if not input.numel():  # which PyTorch refuses
        out, offsets = fake(input, kernel, stride, padding, dilation, ceil_mode)
        return out.fill_(-torch.inf), offsets.fill_(NOWHERE)
    out, at = torch.ops.aten.max_pool2d_with_indices.default(
        input, kernel, stride, padding, dilation, ceil_mode)
    taps, first = [], []
    inside = reached = torch.ones_like(at, dtype=torch.bool)
    for place, corner, n, k, d in zip((at // input.shape[3], at % input.shape[3]),
                                      _corners(out, stride, padding), input.shape[2:], kernel,
                                      dilation, strict=True):
        tap = (place - corner) // d
        taps.append(tap)
        inside = inside & (place - corner == tap * d) & (tap >= 0) & (tap < k) & (place < n)
        first.append(-(corner.clamp(max=0) // d))
        reached = reached & (first[-1] < k) & (corner + first[-1] * d < n)
    none = torch.full_like(at, NOWHERE)
    earliest = torch.where(reached, first[0] * kernel[1] + first[1], none)
    return out, torch.where(inside, taps[0] * kernel[1] + taps[1], earliest).to(torch.uint8)


def located(offsets: Tensor, size, kernel, stride, padding,
            dilation) -> tuple[Tensor, Tensor]:
    """Indices of the taps in their planes, int64, and which offsets name a tap that is in the
    image; 0 of others: `NOWHERE`, and what no pooling of this geometry gave."""
    (rows, columns), at = _corners(offsets, stride, padding), offsets.long()
    row = rows + at // kernel[1] * dilation[0]
    column = columns + at % kernel[1] * dilation[1]
    named = ((at < kernel[0] * kernel[1]) & (row >= 0) & (row < size[0])
             & (column >= 0) & (column < size[1]))
    return torch.where(named, row * size[1] + column, 0), named


def check_backward(grad, offsets, input_size, kernel_size, stride=(), padding=(0,), dilation=(1,),
                   ceil_mode=False):
    op = "max_pool2d_with_offsets_backward"
    check_real(op, "grad", grad, 4)
    check_same_device(op, grad, offsets=offsets)
    if len(input_size) != 2 or input_size[0] < 0 or input_size[1] < 0:
        fail(op, "input_size", "(H, W) of the input", list(input_size))
    window, out = geometry(op, input_size, kernel_size, stride, padding, dilation, ceil_mode)
    if tuple(grad.shape[2:]) != out:
        fail(op, "grad", f"of shape {(*grad.shape[:2], *out)}", describe(grad))
    if offsets.dtype != torch.uint8 or offsets.shape != grad.shape:
        fail(op, "offsets", f"uint8 of shape {tuple(grad.shape)}", describe(offsets))
    return Call((grad, offsets, tuple(input_size), *window))


def fake_backward(grad, offsets, input_size, *window):
    return torch.empty((*grad.shape[:2], *input_size), dtype=grad.dtype, device=grad.device,
                       memory_format=suggest_memory_format(offsets))


def reference_backward(grad: Tensor, offsets: Tensor, input_size, kernel, stride, padding, dilation,
                       ceil_mode):
    """To each pixel the sum over the windows whose maximum it is, by row and column, in float32."""
    shape = (*grad.shape[:2], *input_size)
    if 0 in shape or not grad.numel():  # which PyTorch refuses
        return grad.new_zeros(shape)
    places, named = located(offsets, input_size, kernel, stride, padding, dilation)
    given = wide(grad).masked_fill(~named, 0).contiguous()
    return torch.ops.aten.max_pool2d_with_indices_backward.default(
        given, given.new_empty(shape), kernel, stride, padding, dilation, ceil_mode,
        places.contiguous()).to(grad.dtype)


class _MaxPool2d(Function):
    operator = "max_pool2d_with_offsets"

    @staticmethod
    def call(input, *window):
        return ops.max_pool2d_with_offsets.default(input, *window)

    below = call

    @staticmethod
    def forward(ctx, input, *window):
        with below_autograd():
            out, offsets = ops.max_pool2d_with_offsets.default(input, *window)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)  # of the offsets zeros would be made
        ctx.save_for_backward(offsets)
        ctx.size, ctx.window = input.shape[2:], window
        return out, offsets

    @staticmethod
    def backward(ctx, grad, _):
        (offsets,) = ctx.saved_tensors
        if grad is None:
            return (None,) * (1 + len(ctx.window))
        return (ops.max_pool2d_with_offsets_backward.default(grad, offsets, ctx.size, *ctx.window),
                *[None] * len(ctx.window))


class _Backward(Function):
    """It is linear in the gradient; its own is PyTorch's, of any order."""

    operator = "max_pool2d_with_offsets_backward"

    @staticmethod
    def call(grad, offsets, *window):
        return ops.max_pool2d_with_offsets_backward.default(grad, offsets, *window)

    below = call

    @staticmethod
    def forward(ctx, grad, offsets, *window):
        with below_autograd():
            out = ops.max_pool2d_with_offsets_backward.default(grad, offsets, *window)
        ctx.save_for_backward(offsets)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        size, *given = ctx.window
        (*window, _), _ = geometry(_Backward.operator, size, *given)
        at, named = located(offsets, size, *window)
        found = grad.flatten(2).gather(2, at.flatten(2)).view(at.shape)
        return (found.masked_fill(~named, 0), *[None] * (1 + len(ctx.window)))


def autograd(input, *window):
    """Its arguments are checked below: by the backend that runs."""
    return differentiate(_MaxPool2d, (input,), *window)


def autograd_backward(grad, offsets, *window):
    return differentiate(_Backward, (grad, offsets), *window)


WINDOWS = (((3, 3), (2, 2), (1, 1)), ((2,),), ((3, 2), (1, 3), (1,), (2, 1), True))


def samples(v):
    x = v.leaf(2, 5, 9, 8)
    return [Sample((x, *WINDOWS[0])), Sample((channels_last(x).detach().half(), *WINDOWS[2])),
            Sample((v.real(2, 5, 9, 8), *WINDOWS[2]), kernel={}),
            *(Sample((t, *WINDOWS[0]), kernel={})
              for t in (v.real(2, 3, 9, 8).half(), channels_last(v.real(2, 70, 9, 8).bfloat16()),
                        channels_last(v.real(2, 70, 9, 8).half())))]


def samples_backward(v):
    def sample(shape, form, window, dtype=torch.float32, **kw):
        offsets = reference(*check(form(v.real(*shape)), *window).args)[1]
        grad = v.real(*offsets.shape, dtype=dtype)
        return Sample((form(grad), offsets, shape[2:], *window), **kw)

    first, half = sample((2, 5, 9, 8), channels_last, WINDOWS[1]), torch.float16
    return [first._replace(args=(first.args[0].requires_grad_(), *first.args[1:])),
            sample((2, 5, 9, 8), torch.clone, WINDOWS[0]),
            sample((2, 5, 9, 8), channels_last, WINDOWS[2], kernel={}),
            sample((2, 3, 9, 8), torch.clone, WINDOWS[0], half, kernel={}),
            sample((2, 70, 9, 8), channels_last, WINDOWS[0], half, kernel={})]


define(Operator(
    schemas=("max_pool2d_with_offsets(Tensor input, int[2] kernel_size, int[2] stride=[], "
             "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)",),
    group="Training", check=check, fake=fake, reference=reference, autograd=autograd,
    samples=samples, batched=images("input"), engine=False,
    text="""
Max pooling that also names, by one byte, the tap of each window that is the maximum. Differentiable
in input, of any order; the backward keeps the bytes alone.

Of equal maxima it is the first tap, row by row; NaN is larger than all, the last one counts.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, C, H, W).
  kernel_size: one or two integers, at least 1; at most 255 taps.
  stride: one or two; (): as kernel_size.
  padding: at least 0, at most half of kernel_size; it never wins.
  dilation: at least 1.
  ceil_mode: round the output's size up, as nn.MaxPool2d.
Returns:
  (maxima (N, C, OH, OW) in the dtype of input; uint8 offsets of the same shape: row times kw plus
  column of the tap, 255 where none is in the image). In the memory format of input.
Errors:
  an input of another type or rank, sizes out of range, more than 255 taps, a window larger than
  the padded image.
Example:
  >>> out, offsets = ops.max_pool2d_with_offsets(torch.tensor([[[[1.0, 5.0], [7.0, 7.0]]]]), 2)
  >>> out.item(), offsets.item()
  (7.0, 2)
"""))
define(Operator(
    schemas=("max_pool2d_with_offsets_backward(Tensor grad, Tensor offsets, SymInt[2] input_size, "
             "int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
             "bool ceil_mode=False) -> Tensor",),
    group="Training", check=check_backward, fake=fake_backward, reference=reference_backward,
    autograd=autograd_backward, samples=samples_backward, batched=images("grad", "offsets"),
    engine=False,
    text="""
The gradient of the input of max_pool2d_with_offsets. Differentiable in grad, of any order.

A pixel gets the sum over the windows whose maximum it is, row by row, added in float32: the same
bits on every run.

Arguments:
  grad: float32, float16, bfloat16 or float64 (N, C, OH, OW), of the maxima.
  offsets: uint8, the shape of grad, from max_pool2d_with_offsets; one that names no tap in the
    image gives nothing.
  input_size: (H, W) of the input.
  kernel_size: as of max_pool2d_with_offsets.
  stride: as there.
  padding: as there.
  dilation: as there.
  ceil_mode: as there.
Returns:
  (N, C, H, W) in the dtype of grad and the memory format of offsets.
Errors:
  those of max_pool2d_with_offsets; a grad or offsets of another type or shape.
Example:
  >>> _, offsets = ops.max_pool2d_with_offsets(torch.tensor([[[[1.0, 5.0], [7.0, 7.0]]]]), 2)
  >>> ops.max_pool2d_with_offsets_backward(torch.ones(1, 1, 1, 1), offsets, (2, 2), 2).tolist()
  [[[[0.0, 0.0], [1.0, 0.0]]]]
"""))
