"""Layers of the published networks in plain PyTorch, on the arrays of their original files.

The forwards of `plain_*.py` are made of them; none of them uses bitkernels. Images and maps are
(N, C, H, W), padding is TensorFlow's "same", values are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels_tests.models import generated


def same(x: Tensor, kernel: int, stride: int, dilation: int = 1, value: float = 0.0) -> Tensor:
    """x with TensorFlow's padding."""
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        reach = (kernel - 1) * dilation + 1
        total = max(0, (size + stride - 1) // stride * stride - stride + reach - size)
        pads += [total // 2, (total + 1) // 2]
    return F.pad(x, pads, value=value)


class Layers:
    """A file's layers with weights, taken one after the other.

    margin: of all values whose sign was taken, the least distance to 0 over its layer's RMS.
    """

    def __init__(self, layers: Sequence, seed: int) -> None:
        self.layers: list[dict[str, Tensor]] = []
        index = 0
        for layer, weights in layers:
            values = {}
            for name, shape in weights:
                kind = generated.kind_of(layer, name)
                array = generated.weight(seed, index, kind, shape).astype(np.float64)
                values[kind] = torch.from_numpy(array)
                index += 1
            if values:
                self.layers.append(values)
        self.margin = float("inf")

    def sign(self, x: Tensor) -> Tensor:
        self.margin = min(self.margin, float(x.abs().min() / x.square().mean().sqrt()))
        return torch.where(x < 0, -1.0, 1.0).double()

    def conv(self, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = self.layers.pop(0)["kernel"].permute(3, 2, 0, 1)
        x = same(x, kernel.shape[-1], stride, dilation)
        return F.conv2d(x, kernel, None, stride, 0, dilation)

    def binary_conv(self, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        self.layers[0]["kernel"] = torch.where(self.layers[0]["kernel"] < 0, -1.0, 1.0).double()
        return self.conv(self.sign(x), stride, dilation)

    def grouped_conv(self, x: Tensor, groups: int) -> Tensor:
        return torch.cat([self.conv(part) for part in x.chunk(groups, 1)], 1)

    def norm(self, x: Tensor, eps: float = 1e-5) -> Tensor:
        layer = {k: v.view(-1, 1, 1) for k, v in self.layers.pop(0).items()}
        x = (x - layer["moving_mean"]) / (layer["moving_variance"] + eps) ** 0.5
        return x * layer.get("gamma", 1) + layer.get("beta", 0)

    def prelu(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.layers.pop(0)["alpha"].view(-1, 1, 1))

    def dense(self, x: Tensor) -> Tensor:
        layer = self.layers.pop(0)
        return x @ layer["kernel"] + layer.get("bias", 0)

    def max_pool(self, x: Tensor, kernel: int, stride: int) -> Tensor:
        return F.max_pool2d(same(x, kernel, stride, value=float("-inf")), kernel, stride)

    def mean_pool(self, x: Tensor) -> Tensor:
        """2x2 pixels, of those that are in the image."""
        ones = same(torch.ones_like(x[:1, :1]), 2, 2)
        return F.avg_pool2d(same(x, 2, 2), 2) / F.avg_pool2d(ones, 2)
