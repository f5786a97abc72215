"""Max pooling that keeps one byte an output for the backward, in place of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from bitkernels._dispatch import functional_transforms
from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.ops.max_pool2d_with_offsets import NOWHERE


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    """table[places], in the memory format of `places`, which are dense.

    `Tensor.take` needs twice the time (4.6 and 2.2 ms for 1.6 million, one thread of a Xeon of
    family 6, model 207, 2026-11-26).
    """
    found, line = torch.empty_like(places, dtype=table.dtype), ((places.numel(),), (1,))
    torch.index_select(table, 0, places.as_strided(*line), out=found.as_strided(*line))
    return found


class _Geometry:
    """A pooling of images of one width: indices in a plane to numbers in a window, and back."""

    def __init__(self, pool: nn.MaxPool2d, width: int) -> None:
        self.kernel, self.stride = _pair(pool.kernel_size), _pair(pool.stride)
        self.padding, self.dilation = _pair(pool.padding), _pair(pool.dilation)
        self.ceil_mode, self.width = pool.ceil_mode, width

    def fits(self) -> bool:
        """Whether a byte names a position, and the distance of two pixels their taps.

        False also for arguments that are not pairs of integers.
        """
        for pair in (self.kernel, self.stride, self.padding, self.dilation):
            if len(pair) != 2 or not all(isinstance(n, int) for n in pair):
                return False
        reach = (self.kernel[1] - 1) * self.dilation[1]
        return self.kernel[0] * self.kernel[1] <= NOWHERE and reach < self.width * self.dilation[0]

    def arguments(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def taps(self, device: torch.device) -> Tensor:
        """Distance of each tap of a window from its first one, in pixels: (kh * kw)."""
        rows, columns = (torch.arange(k, device=device) * d
                         for k, d in zip(self.kernel, self.dilation, strict=True))
        return (rows.view(-1, 1) * self.width + columns).flatten()

    def starts(self, out: Tensor) -> Tensor:
        """Index in its plane of every window's first pixel, also where that is padding."""
        rows, columns = (torch.arange(n, device=out.device) * s - p for n, s, p in zip(
            out.shape[-2:], self.stride, self.padding, strict=True))
        return rows.view(-1, 1) * self.width + columns

    def to_numbers(self, indices: Tensor) -> Tensor:
        """uint8 numbers of the taps at int64 indices, which are overwritten.

        `NOWHERE` also of an index outside its window: on some devices PyTorch's is 0 where all of a
        window is -inf.
        """
        taps = self.taps(indices.device)
        last = (self.kernel[0] - 1) * self.dilation[0] * self.width + (
            self.kernel[1] - 1) * self.dilation[1]
        table = torch.full((last + 3,), NOWHERE, dtype=torch.uint8, device=indices.device)
        table[taps + 1] = torch.arange(len(taps), dtype=torch.uint8, device=indices.device)
        return _look_up(table, indices.sub_(self.starts(indices) - 1).clamp_(0, last + 2))

    def to_indices(self, numbers: Tensor) -> Tensor:
        """The inverse; 0 of `NOWHERE`."""
        taps = self.taps(numbers.device)
        table = torch.full((NOWHERE + 1,), -2**62, device=numbers.device)
        table[:len(taps)] = taps
        # With int64 places the look-up takes twice the time, once they are not in the cache.
        return _look_up(table, numbers.int()).add_(self.starts(numbers)).clamp_(min=0)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, geometry):
        out, indices = torch.ops.aten.max_pool2d_with_indices.default(input, *geometry.arguments())
        ctx.save_for_backward(geometry.to_numbers(indices))
        ctx.geometry, ctx.shape, ctx.stride = geometry, input.shape, input.stride()
        return out

    @staticmethod
    def backward(ctx, grad) -> Any:
        (numbers,) = ctx.saved_tensors
        # Of the input only shape and memory format are read.
        input = torch.empty_strided(ctx.shape, ctx.stride, dtype=grad.dtype, device=grad.device)
        return torch.ops.aten.max_pool2d_with_indices_backward.default(
            grad, input, *ctx.geometry.arguments(), ctx.geometry.to_indices(numbers)), None


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _has_operator(pool: nn.MaxPool2d, input: Tensor) -> bool:
    """Whether `max_pool2d_with_offsets` takes it; all else is PyTorch's, which says what is wrong.

    On GPUs, where it is one launch in each direction; elsewhere where a window may have no tap in
    the image, whose gradient PyTorch writes beyond it (torch 2.13). An export keeps no backward.
    """
    if torch.compiler.is_exporting():
        return False
    sizes = [_pair(value) for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    if not all(len(pair) == 2 and all(type(n) is int for n in pair) for pair in sizes):
        return False
    if not _on_gpu(input) and all(
            d == 1 or d <= n for d, n in zip(sizes[3], input.shape[-2:], strict=True)):
        return False
    return sizes[0][0] * sizes[0][1] <= NOWHERE and all(
        min(k, s, d) > 0 and 0 <= 2 * p <= k and n + 2 * p > d * (k - 1)
        for n, k, s, p, d in zip(input.shape[-2:], *sizes, strict=True))


class MaxPool2d(FxLeaf, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` whose backward keeps one byte an output element.

    PyTorch keeps the whole input and an int64 index an output. Here the position of the maximum in
    its window is kept. Values, gradients of any order and the choice among equal maxima are
    PyTorch's. Input (N, C, H, W) or (C, H, W), any real dtype.

    On a GPU it is `bitkernels.ops.max_pool2d_with_offsets`, one launch in each direction, compiled
    or not; its gradient is added in a fixed order. (Where all of a window is -inf, PyTorch gives
    the gradient of channels-last images to pixel 0 there, and this to the window's first.) So it is
    everywhere where the dilation is larger than the image: a window between whose taps the image
    lies has no gradient, and PyTorch adds it to memory that is not the image's. Elsewhere PyTorch's
    kernels run, and its whole function under `torch.compile`: Inductor itself keeps a byte, and
    beyond 25 positions the int64 index, without the input.

    PyTorch's own function also runs where nothing is kept (no gradient is asked), with
    return_indices, for windows of more than 255 positions, on a CPU also for windows wider than the
    image, in `torch.export`, `torch.jit.trace`, transforms of `torch.func` and forward mode.
    """

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if (self.return_indices or torch.jit.is_tracing() or functional_transforms()
                or input.dim() not in (3, 4)
                or not (torch.is_grad_enabled() and input.requires_grad)):
            return super().forward(input)
        if _has_operator(self, input):
            images = input if input.dim() == 4 else input.unsqueeze(0)
            out, _ = torch.ops.bitkernels.max_pool2d_with_offsets.default(
                images, _pair(self.kernel_size), _pair(self.stride), _pair(self.padding),
                _pair(self.dilation), self.ceil_mode)
            return out if input.dim() == 4 else out.squeeze(0)
        if torch.compiler.is_compiling():
            return super().forward(input)
        geometry = _Geometry(self, input.shape[-1])
        if not geometry.fits():
            return super().forward(input)
        return _MaxPool2d.apply(input, geometry)
