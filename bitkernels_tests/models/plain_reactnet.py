"""ReActNet-A and -18 in plain PyTorch, on state dicts with the names of their published code.

Nothing here uses bitkernels. Values are those of the published code but for the sign of 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

A = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


def norm_entries(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for rest in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{rest}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def entries(channels: Sequence[int] = A, classes: int = 1000
            ) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of ReActNet-A's state dict, in its order (AdamBNN's form)."""
    yield "feature.0.conv1.weight", (channels[0], 3, 3, 3)
    yield from norm_entries("feature.0.bn1", channels[0])
    for i, (inner, outer) in enumerate(zip(channels, channels[1:], strict=False), 1):
        name = f"feature.{i}."
        yield f"{name}move11.bias", (1, inner, 1, 1)
        yield f"{name}binary_3x3.weight", (inner, inner, 3, 3)
        yield from norm_entries(f"{name}bn1", inner)
        yield f"{name}move12.bias", (1, inner, 1, 1)
        yield f"{name}prelu1.weight", (inner,)
        yield f"{name}move13.bias", (1, inner, 1, 1)
        yield f"{name}move21.bias", (1, inner, 1, 1)
        branches = [("binary_pw", "bn2")] if inner == outer else [
            ("binary_pw_down1", "bn2_1"), ("binary_pw_down2", "bn2_2")]
        for conv, _ in branches:
            yield f"{name}{conv}.weight", (inner, inner, 1, 1)
        for _, norm in branches:
            yield from norm_entries(f"{name}{norm}", inner)
        yield f"{name}move22.bias", (1, outer, 1, 1)
        yield f"{name}prelu2.weight", (outer,)
        yield f"{name}move23.bias", (1, outer, 1, 1)
    yield "fc.weight", (classes, channels[-1])
    yield "fc.bias", (classes,)


def entries18(blocks: Sequence[int] = (4, 4, 4, 4), classes: int = 1000
              ) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the state dict of ReActNet-18, in its order."""
    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm_entries("bn1", 64)
    inner = 64
    for section, count in enumerate(blocks):
        outer = 64 << section
        for k in range(count):
            name = f"layer{section + 1}.{k}."
            yield f"{name}move0.bias", (1, inner, 1, 1)
            yield f"{name}binary_conv.weight", (outer, inner, 3, 3)
            yield from norm_entries(f"{name}bn1", outer)
            yield f"{name}move1.bias", (1, outer, 1, 1)
            yield f"{name}prelu.weight", (outer,)
            yield f"{name}move2.bias", (1, outer, 1, 1)
            if inner != outer:
                yield f"{name}downsample.1.weight", (outer, inner, 1, 1)
                yield from norm_entries(f"{name}downsample.2", outer)
            inner = outer
    yield "fc.weight", (classes, inner)
    yield "fc.bias", (classes,)


def generated(names: Iterator[tuple[str, tuple[int, ...]]], seed: int) -> dict[str, Tensor]:
    """A state dict of random values, in which every part matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in names:
        values = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            values = torch.tensor(7)
        elif name.endswith("running_var"):
            values = values.abs() + 0.5
        elif "temperature" in name:
            values = torch.full(shape, 9e-8)
        elif name.endswith("scale"):  # beyond its range, too
            values = values * 0.5 + 0.5
        elif len(shape) == 1 and "prelu" in name or "activation" in name:
            values = values.abs() * 0.2
        elif len(shape) == 1 and name.endswith("weight"):
            values = values * 0.2 + 1
        elif len(shape) == 1 or "move" in name:
            values = values * 0.2
        elif name.startswith("fc"):
            values = values * 0.05
        state[name] = values
    return state


class Network:
    """The layers of one state dict.

    margin: of all values whose sign was taken, the least distance to 0 over its layer's RMS.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {k: v.double() for k, v in state.items()}
        self.margin = float("inf")

    def norm(self, name: str, x: Tensor) -> Tensor:
        s = self.state
        return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"],
                            s[f"{name}.weight"], s[f"{name}.bias"])

    def binary(self, shift: str, weight: str, x: Tensor, stride: int = 1,
               scaled: bool = True) -> Tensor:
        """The convolution of the signs of x + shift with those of the weight, zeros around."""
        w = self.state[weight]
        x = x + self.state[shift]
        self.margin = min(self.margin, float(x.abs().min() / x.square().mean().sqrt()))
        signs = w.sign() * w.abs().mean((1, 2, 3), keepdim=True) if scaled else w.sign()
        return F.conv2d(x.sign(), signs, None, stride, w.shape[-1] // 2)

    def rprelu(self, names: Sequence[str], x: Tensor) -> Tensor:
        first, slope, last = (self.state[name] for name in names)
        return F.prelu(x + first, slope) + last

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.state["fc.weight"], self.state["fc.bias"])


def reactnet_a(net: Network, x: Tensor, channels: Sequence[int] = A) -> Tensor:
    """Logits of images (N, 3, H, W) in float64."""
    x = net.norm("feature.0.bn1", F.conv2d(x, net.state["feature.0.conv1.weight"], None, 2, 1))
    for i, (inner, outer) in enumerate(zip(channels, channels[1:], strict=False), 1):
        name = f"feature.{i}."
        stride = 2 if i > 1 and inner != outer else 1
        h = net.norm(f"{name}bn1", net.binary(f"{name}move11.bias", f"{name}binary_3x3.weight", x,
                                              stride))
        h = h + (F.avg_pool2d(x, 2) if stride == 2 else x)
        h = net.rprelu([f"{name}{p}" for p in ("move12.bias", "prelu1.weight", "move13.bias")], h)
        branches = [("binary_pw", "bn2")] if inner == outer else [
            ("binary_pw_down1", "bn2_1"), ("binary_pw_down2", "bn2_2")]
        x = torch.cat([net.norm(f"{name}{norm}", net.binary(
            f"{name}move21.bias", f"{name}{conv}.weight", h)) + h for conv, norm in branches], 1)
        x = net.rprelu([f"{name}{p}" for p in ("move22.bias", "prelu2.weight", "move23.bias")], x)
    return net.head(x)


def reactnet18(net: Network, x: Tensor, blocks: Sequence[int] = (4, 4, 4, 4)) -> Tensor:
    """Logits of images (N, 3, H, W) in float64."""
    x = net.norm("bn1", F.conv2d(x, net.state["conv1.weight"], None, 2, 3))
    x = F.max_pool2d(x, 3, 2, 1)
    for section, count in enumerate(blocks, 1):
        for k in range(count):
            name = f"layer{section}.{k}."
            stride = 2 if section > 1 and k == 0 else 1
            h = net.norm(f"{name}bn1", net.binary(f"{name}move0.bias", f"{name}binary_conv.weight",
                                                  x, stride))
            if stride == 2:
                x = F.conv2d(F.avg_pool2d(x, 2), net.state[f"{name}downsample.1.weight"])
                x = net.norm(f"{name}downsample.2", x)
            x = net.rprelu([f"{name}{p}" for p in ("move1.bias", "prelu.weight", "move2.bias")],
                           h + x)
    return net.head(x)
