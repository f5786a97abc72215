"""ReActNet-18 (Liu et al. 2020): ResNet-18 with a shortcut and learned shifts at every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bitkernels.models.parts import weight_options
from bitkernels.models.registry import register_class
from bitkernels.nn import BinaryConv2d, BinaryResidualBlock, MaxPool2d, RPReLU, RSign


def reactnet18_block(in_channels: int, out_channels: int, stride: int = 1, *,
                     binary_weights: bool = True) -> BinaryResidualBlock:
    """RPReLU(BN(conv3x3(RSign(x))) + shortcut(x)), as one operator in training.

    The shortcut is x, or where the shape changes the mean of 2x2 pixels, a real 1x1 convolution and
    a batch norm. Input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride),
    ceil(W / stride)).
    """
    conv = BinaryConv2d(in_channels, out_channels, 3, stride, 1, bias=False, input_quantizer=None,
                        **weight_options(binary_weights, "ste_sign", "detached"))
    shortcut: nn.Module | None = None
    if stride > 1 or in_channels != out_channels:
        # ceil_mode: an odd image has as many pixels as its 3x3 convolution.
        shortcut = nn.Sequential(
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
    return BinaryResidualBlock(conv, nn.BatchNorm2d(out_channels), sign=RSign(in_channels),
                               act=RPReLU(out_channels), shortcut=shortcut)


class ReActNet18(nn.Module):
    """A real 7x7 convolution, 16 binary residual blocks and a real linear layer.

    Input (N, in_channels, H, W); output (N, num_classes). The weights of the binary convolutions
    are scaled by their mean magnitude per channel, a constant for the gradient. The stem divides
    the sides by 4, each section after the first by 2.

    blocks, channels: of each section. binary_weights: False makes the network of the first step of
    training, with the same state_dict keys.

    The published network is ReActNet18(1000), 11,704,424 parameters with 1,000 classes. Sources:
    arXiv 2003.03488 and its code (the stem has no activation). Weights start as torch's
    convolutions do. An image with an odd side is averaged with the last row and column alone.

    attention_layers: the names of the blocks, for attention matching against another network.

    Raises ValueError where blocks and channels do not have the same length.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *,
                 blocks: Sequence[int] = (4, 4, 4, 4),
                 channels: Sequence[int] = (64, 128, 256, 512),
                 binary_weights: bool = True) -> None:
        super().__init__()
        blocks, channels = tuple(blocks), tuple(channels)
        if not channels or len(blocks) != len(channels):
            raise ValueError("ReActNet18: each section has a number of blocks and of channels, "
                             f"got blocks={blocks} and channels={channels}")
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels[0], 7, 2, 3, bias=False),
                                  nn.BatchNorm2d(channels[0]), MaxPool2d(3, 2, 1))
        body, before = [], channels[0]
        for section, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            for i in range(count):
                body.append(reactnet18_block(before, width, 2 if section and not i else 1,
                                             binary_weights=binary_weights))
                before = width
        self.blocks = nn.Sequential(*body)
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(body)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(input))).flatten(1))


register_class("reactnet-18", ReActNet18)
