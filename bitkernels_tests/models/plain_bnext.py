"""BNext in plain PyTorch, on state dicts with the names of its published code.

Nothing here uses bitkernels. Values are those of the published code but for the sign of 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitkernels_tests.models.plain_reactnet import Network, norm_entries

T = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


def entries(channels: Sequence[int] = T, classes: int = 1000
            ) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the state dict, those that are never used too."""
    yield "feature.0.conv1.weight", (channels[0], 3, 3, 3)
    yield from norm_entries("feature.0.bn1", channels[0])
    yield "feature.0.prelu.weight", (channels[0],)
    for i, (inner, outer) in enumerate(zip(channels, channels[1:], strict=False), 1):
        halves = [("Attention", 3)] + ([("FFN", 1)] if inner == outer
                                       else [("FFN_1", 1), ("FFN_2", 1)])
        for half, size in halves:
            name = f"feature.{i}.{half}."
            yield f"{name}scale", (1, inner, 1, 1)
            yield f"{name}move.bias", (1, inner, 1, 1)
            yield f"{name}binary_activation.temperature", (1,)
            yield f"{name}binary_conv.weight", (inner, inner, size, size)
            yield f"{name}binary_conv.temperature", (1,)
            yield from norm_entries(f"{name}norm1", inner)
            yield from norm_entries(f"{name}norm2", inner)
            yield f"{name}activation1.weight", (inner,)
            yield f"{name}activation2.weight", (inner,)
            yield f"{name}se.se.1.weight", (inner // 8, inner, 1, 1)
            yield f"{name}se.se.1.bias", (inner // 8,)
            yield f"{name}se.se.3.weight", (inner, inner // 8, 1, 1)
            yield f"{name}se.se.3.bias", (inner,)
    yield "prelu.weight", (channels[-1],)
    yield "fc.weight", (classes, channels[-1])
    yield "fc.bias", (classes,)


def half(net: Network, name: str, x: Tensor, stride: int, modulated: bool) -> Tensor:
    """One half of a block, of 3x3 or 1x1 as its filters are."""
    s = net.state
    residual = F.prelu(x, s[f"{name}activation1.weight"]) if modulated else x
    b = net.binary(f"{name}move.bias", f"{name}binary_conv.weight", x, stride, scaled=False)
    b = F.prelu(net.norm(f"{name}norm1", b), s[f"{name}activation2.weight"])
    if stride == 2:
        x, residual = F.avg_pool2d(x, 2), F.avg_pool2d(residual, 2)
    scale = s[f"{name}scale"]
    if s[f"{name}binary_conv.weight"].shape[-1] == 1:
        scale = scale.clamp(0, 1)
    gate = (scale * x + (1 - scale) * b).mean((2, 3), keepdim=True)
    gate = F.relu(F.conv2d(gate, s[f"{name}se.se.1.weight"], s[f"{name}se.se.1.bias"]))
    gate = F.conv2d(gate, s[f"{name}se.se.3.weight"], s[f"{name}se.se.3.bias"])
    b = torch.sigmoid(gate) * b
    return net.norm(f"{name}norm2", b * residual if modulated else b) + residual


def bnext(net: Network, x: Tensor, channels: Sequence[int] = T) -> Tensor:
    """Logits of images (N, 3, H, W) in float64."""
    x = net.norm("feature.0.bn1", F.conv2d(x, net.state["feature.0.conv1.weight"], None, 2, 1))
    for i, (inner, outer) in enumerate(zip(channels, channels[1:], strict=False), 1):
        name = f"feature.{i}."
        stride = 2 if i > 1 and inner != outer else 1
        x = half(net, f"{name}Attention.", x, stride, modulated=i % 2 == 0)
        if inner == outer:
            x = half(net, f"{name}FFN.", x, 1, modulated=False)
        else:
            x = torch.cat([half(net, f"{name}{branch}.", x, 1, modulated=False)
                           for branch in ("FFN_1", "FFN_2")], 1)
    return net.head(F.prelu(x, net.state["prelu.weight"]))
