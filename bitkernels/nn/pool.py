"""Max pooling that keeps one byte an output for the backward, in place of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair


class _Geometry:
    """A pooling of one image size: positions in a window as numbers below 256, and back."""

    def __init__(self, pool: nn.MaxPool2d, width: int) -> None:
        self.kernel, self.stride = _pair(pool.kernel_size), _pair(pool.stride)
        self.padding, self.dilation = _pair(pool.padding), _pair(pool.dilation)
        self.ceil_mode, self.width = pool.ceil_mode, width

    def fits(self) -> bool:
        """Whether a byte names a position, and the distance of two pixels their taps."""
        reach = (self.kernel[1] - 1) * self.dilation[1]
        return self.kernel[0] * self.kernel[1] <= 256 and reach < self.width * self.dilation[0]

    def arguments(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode

    def taps(self, device: torch.device) -> Tensor:
        """Distance of each tap of a window from its first one, in pixels: (kh * kw)."""
        rows, columns = (torch.arange(k, device=device) * d
                         for k, d in zip(self.kernel, self.dilation, strict=True))
        return (rows.view(-1, 1) * self.width + columns).flatten()

    def numbers(self, device: torch.device) -> Tensor:
        """The inverse: the number of the tap at a distance, undefined elsewhere."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        found = torch.empty((kh - 1) * dh * self.width + (kw - 1) * dw + 1, dtype=torch.uint8,
                            device=device)
        found[self.taps(device)] = torch.arange(kh * kw, dtype=torch.uint8, device=device)
        return found

    def starts(self, out: Tensor) -> Tensor:
        """Number in its plane of every window's first pixel, also where that is padding."""
        rows, columns = (torch.arange(n, device=out.device) * s - p for n, s, p in zip(
            out.shape[-2:], self.stride, self.padding, strict=True))
        return rows.view(-1, 1) * self.width + columns


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, geometry):
        out, indices = torch.ops.aten.max_pool2d_with_indices.default(input, *geometry.arguments())
        ctx.save_for_backward(geometry.numbers(input.device).take(indices - geometry.starts(out)))
        ctx.geometry, ctx.shape, ctx.stride = geometry, input.shape, input.stride()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad) -> Any:
        (numbers,) = ctx.saved_tensors
        taps = ctx.geometry.taps(grad.device)
        indices = taps.take(numbers.long()).add_(ctx.geometry.starts(grad))
        # Of the input only shape and memory format are read.
        input = torch.empty_strided(ctx.shape, ctx.stride, dtype=grad.dtype, device=grad.device)
        return torch.ops.aten.max_pool2d_with_indices_backward.default(
            grad, input, *ctx.geometry.arguments(), indices), None


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` whose backward keeps one byte an output element.

    PyTorch keeps the whole input and an int64 index an output. Here the position of the maximum in
    its window is kept. Values, gradients and the choice among equal maxima are PyTorch's, whose
    kernels run; there is no second derivative. Input (N, C, H, W) or (C, H, W), any real dtype.

    PyTorch's own function runs where nothing is kept (no gradient is asked), with return_indices,
    for windows of more than 256 positions or wider than the image, and under `torch.compile`, whose
    Inductor keeps a byte itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        if (self.return_indices or torch.compiler.is_compiling() or input.dim() not in (3, 4)
                or not (torch.is_grad_enabled() and input.requires_grad)):
            return super().forward(input)
        geometry = _Geometry(self, input.shape[-1])
        if not geometry.fits():
            return super().forward(input)
        return _MaxPool2d.apply(input, geometry)
