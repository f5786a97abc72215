"""The networks of bench_train.py, of binary blocks or emulated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitkernels.nn as bnn
from bitkernels.models import ReActNet, ReActNet18
from bitkernels.models.reactnet import PUBLISHED_CHANNELS
from bitkernels.quantizers import SteSign

STAGES = (64, 128, 256, 512)


def quicknet_block(channels: int) -> bnn.BinaryResidualBlock:
    """Sign, 3x3 padded with +1, ReLU, batch norm (Bannink et al. 2021)."""
    conv = bnn.BinaryConv2d(channels, channels, 3, padding=1, bias=False, pad_value=1,
                            input_quantizer=SteSign(1.25), weight_quantizer=SteSign(1.25))
    return bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(channels), relu=True)


class Blur(nn.Module):
    """Binomial 3x3 filter of stride 2 on each channel."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype), None, 2, 1, 1, len(self.kernel))


class Network(nn.Module):
    """A stem, whose activations may be computed again in the backward, and the rest."""

    def __init__(self, stem: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.stem, self.body = stem, body
        self.checkpoint_stem = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint_stem:
            return self.body(checkpoint(self.stem, x, use_reentrant=False))
        return self.body(self.stem(x))


def reactnet18(blocks: int) -> Network:
    """ResNet-18's shape, every 3x3 convolution of its stages a binary block."""
    model = ReActNet18(1000, channels=STAGES, blocks=(blocks,) * len(STAGES))
    return Network(model.stem, nn.Sequential(*model.blocks, model.pool, nn.Flatten(),
                                             model.classifier))


def reactnet_a(blocks: int) -> Network:
    """The published ReActNet-A: binary 3x3 and 1x1 convolutions in turns; blocks=1: two pairs."""
    channels = PUBLISHED_CHANNELS if blocks > 1 else PUBLISHED_CHANNELS[:3]
    model = ReActNet(1000, channels=channels, stem_stride=2)
    body = [part for block in model.blocks for part in (block.spatial, block.pointwise)]
    return Network(model.stem, nn.Sequential(*body, model.pool, nn.Flatten(), model.classifier))


def quicknet(blocks: int) -> Network:
    """QuickNet: blocks of one resolution, between them a pooled, blurred 1x1 convolution."""
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8),
        nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64))
    body: list[nn.Module] = []
    for i, stage in enumerate(STAGES):
        if i:
            body += [nn.ReLU(), bnn.MaxPool2d(3, 1, 1), Blur(STAGES[i - 1]),
                     nn.Conv2d(STAGES[i - 1], stage, 1, bias=False), nn.BatchNorm2d(stage)]
        body += [quicknet_block(stage) for _ in range(blocks)]
    return Network(stem, nn.Sequential(*body, nn.ReLU(), *head(STAGES[-1])))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


NETWORKS: dict[str, Callable[[int], Network]] = {
    "reactnet18": reactnet18, "quicknet": quicknet, "reactnet_a": reactnet_a}


class LeanSign(torch.autograd.Function):
    """-1 where x < 0, else +1, times a constant scale; keeps x. Without clip: ApproxSign."""

    @staticmethod
    def forward(ctx, x: Tensor, clip: float | None, scale: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clip = clip
        minus = torch.full((), -1.0, dtype=x.dtype, device=x.device)
        signs = torch.where(x < 0, minus, 1.0)
        return signs if scale is None else signs * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if ctx.clip is not None:
            return torch.where(x.abs() <= ctx.clip, grad, 0.0), None, None
        return torch.where(x.abs() <= 1, grad * (2 - 2 * x.abs()), 0.0), None, None


def published_approx_sign(x: Tensor) -> Tensor:
    """As in the published code of Bi-Real Net and ReActNet."""
    low, negative, high = ((x < bound).to(x.dtype) for bound in (-1, 0, 1))
    y = -low + (x * x + 2 * x) * (1 - low)
    y = y * negative + (2 * x - x * x) * (1 - negative)
    y = y * high + (1 - high)
    return torch.sign(x).detach() - y.detach() + y


def published_sign(x: Tensor, clip: float) -> Tensor:
    clipped = x.clamp(-clip, clip)
    return torch.sign(x).detach() - clipped.detach() + clipped


class Emulated(nn.Module):
    """A binary block in real numbers, with a copy of its modules.

    published: signs as compositions of PyTorch's functions, as networks publish them, whose every
    step autograd keeps; else a `LeanSign`.
    """

    def __init__(self, block: bnn.BinaryResidualBlock, published: bool) -> None:
        super().__init__()
        block = copy.deepcopy(block)
        self.sign, self.conv, self.norm = block.sign, block.conv, block.norm
        self.act, self.shortcut, self.relu = block.act, block.shortcut, block.relu
        self.published = published

    def input_sign(self, x: Tensor) -> Tensor:
        if self.sign is None:
            clip = self.conv.input_quantizer.clip_value  # type: ignore[union-attr]
            return published_sign(x, clip) if self.published else LeanSign.apply(x, clip)
        x = x + self.sign.shift.view(-1, 1, 1)
        return published_approx_sign(x) if self.published else LeanSign.apply(x, None)

    def weight(self) -> Tensor:
        w, clip = self.conv.weight, self.conv.weight_quantizer.clip_value  # type: ignore
        scale = None
        if self.conv.weight_scale is not None:
            scale = w.detach().abs().mean((1, 2, 3), keepdim=True)
        if not self.published:
            return LeanSign.apply(w, clip, scale)
        clipped = w.clamp(-clip, clip)
        signs = torch.sign(w) if scale is None else scale * torch.sign(w)
        return signs.detach() - clipped.detach() + clipped

    def forward(self, x: Tensor) -> Tensor:
        y, pads = self.input_sign(x), self.conv.padding
        if self.conv.pad_value:
            y, pads = F.pad(y, (1, 1, 1, 1), value=float(self.conv.pad_value)), 0
        y = F.conv2d(y, self.weight(), None, self.conv.stride, pads)
        y = self.norm(y.relu() if self.relu else y)
        y = y + (x if self.shortcut is None else self.shortcut(x))
        if self.act is None:
            return y
        shift_in, shift_out = (s.view(-1, 1, 1) for s in (self.act.shift_in, self.act.shift_out))
        return F.prelu(y + shift_in, self.act.slope) + shift_out


def layer_by_layer(block: bnn.BinaryResidualBlock) -> nn.Module:
    block = copy.deepcopy(block)
    block.fused = False
    return block


# What a network is made of, by the name of the provider.
FORMS: dict[str, Callable[[bnn.BinaryResidualBlock], nn.Module]] = {
    "published": lambda block: Emulated(block, True),
    "lean": lambda block: Emulated(block, False),
    "layers": layer_by_layer,
    "bitkernels": copy.deepcopy,
}


def in_form(network: Network, form: str) -> Network:
    """A copy of a network of binary blocks, with equal parameters, each block in that form.

    The emulated forms have PyTorch's own pooling too.
    """
    def convert(module: nn.Module) -> nn.Module:
        if isinstance(module, bnn.BinaryResidualBlock):
            return FORMS[form](module)
        if isinstance(module, bnn.MaxPool2d) and form in ("published", "lean"):
            return nn.MaxPool2d(module.kernel_size, module.stride, module.padding)
        return copy.deepcopy(module)

    return Network(*(nn.Sequential(*map(convert, part.children()))
                     for part in (network.stem, network.body)))
