"""The binary residual layer of Bi-Real Net and ResNetE: one convolution, a shortcut around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from bitkernels.models.parts import glorot_normal_
from bitkernels.nn import BinaryConv2d, BinaryResidualBlock, SameConv2d


def residual_layer(in_channels: int, out_channels: int, stride: int,
                   norm: Callable[[int], nn.Module], *, same: bool = True,
                   **options: Any) -> BinaryResidualBlock:
    """norm(conv3x3(sign(x))) + shortcut(x), as one operator in training.

    The shortcut is x, or where the shape changes the mean of 2x2 pixels, a real 1x1 convolution and
    a norm; an odd side is averaged with the last row and column alone. Input (N, in_channels, H,
    W); output (N, out_channels, ceil(H / stride), ceil(W / stride)).

    same: an even side that is halved is padded after its end only, as TensorFlow does, else on both
      sides, as PyTorch does. options: of the `BinaryConv2d`.
    """
    conv: BinaryConv2d
    if same and stride > 1:
        conv = SameConv2d(in_channels, out_channels, 3, stride, bias=False, **options)
    else:
        conv = BinaryConv2d(in_channels, out_channels, 3, stride, 1, bias=False, **options)
    shortcut: nn.Sequential | None = None
    if stride > 1 or in_channels != out_channels:
        pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        glorot_normal_(pointwise.weight)
        shortcut = nn.Sequential(
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False), pointwise,
            norm(out_channels))
    glorot_normal_(conv.weight)
    return BinaryResidualBlock(conv, norm(out_channels), shortcut=shortcut)


def residual_body(blocks: Sequence[int], channels: Sequence[int],
                  layer: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    """Sections of layers(in_channels, out_channels, stride); each but the first halves the image.

    Raises ValueError where blocks and channels do not have the same length.
    """
    if len(blocks) != len(channels):
        raise ValueError("each section has a number of blocks and of channels, got "
                         f"blocks={blocks} and channels={channels}")
    body, before = [], channels[0]
    for section, (count, width) in enumerate(zip(blocks, channels, strict=True)):
        for i in range(count):
            body.append(layer(before, width, 2 if section and not i else 1))
            before = width
    return nn.Sequential(*body)


def keras_layers_of(body: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """A body's layers with weights in Keras' order: by their distance from the network's end."""
    layers: list[tuple[str, nn.Module]] = []
    block: Any
    for block in body:
        if block.shortcut is None:
            layers += [("conv", block.conv), ("norm", block.norm)]
        else:
            layers += [("conv", block.conv), ("conv", block.shortcut[1]), ("norm", block.norm),
                       ("norm", block.shortcut[2])]
    return layers
