"""ReActNet (Liu et al. 2020): learned shifts around signs and activations, a shortcut per layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels.models.parts import weight_options
from bitkernels.models.registry import register_class
from bitkernels.nn import BinaryConv2d, RPReLU, RSign

PUBLISHED_CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class ReActBlock(nn.Module):
    """A binary 3x3 convolution, then one or two binary 1x1 ones, each with its shortcut.

        h = RPReLU(BN(conv3x3(RSign(x))) + x)             x averaged over 2x2 where stride is 2
        y = RPReLU(BN(conv1x1(RSign(h))) + h)

    Where out_channels is twice in_channels, y has two such branches side by side, which share RSign
    and RPReLU (as the published code does; the paper draws them apart).

    Input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    Raises ValueError where out_channels is neither in_channels nor twice that, and for a stride
    that is neither 1 nor 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *,
                 binary_weights: bool = True) -> None:
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"ReActBlock: {in_channels} channels can become {in_channels} or "
                             f"{2 * in_channels}, not {out_channels}")
        if stride not in (1, 2):
            raise ValueError(f"ReActBlock: stride must be 1 or 2, got {stride!r}")
        options: dict[str, Any] = dict(bias=False, input_quantizer=None, **weight_options(
            binary_weights, "ste_sign", "detached"))
        branches = out_channels // in_channels
        self.sign1 = RSign(in_channels)
        self.conv1 = BinaryConv2d(in_channels, in_channels, 3, stride, 1, **options)
        self.norm1 = nn.BatchNorm2d(in_channels)
        # ceil_mode: an odd image has as many pixels as its 3x3 convolution.
        self.shortcut = (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2
                         else nn.Identity())
        self.act1 = RPReLU(in_channels)
        self.sign2 = RSign(in_channels)
        self.conv2 = nn.ModuleList(
            BinaryConv2d(in_channels, in_channels, 1, **options) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in range(branches))
        self.act2 = RPReLU(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        h = self.act1(self.norm1(self.conv1(self.sign1(input))) + self.shortcut(input))
        signs = self.sign2(h)
        branches = [norm(conv(signs)) + h
                    for conv, norm in zip(self.conv2, self.norm2, strict=True)]
        return self.act2(branches[0] if len(branches) == 1 else torch.cat(branches, 1))


class ReActNet(nn.Module):
    """A real convolution, `ReActBlock`s and a real linear layer on the mean of each channel.

    Input (N, in_channels, H, W); output (N, num_classes). The weights of the binary convolutions
    are scaled by their mean magnitude per channel, a constant for the gradient.

    channels: of the stem, then of each block; a block keeps or doubles them.
    strides: of each block. None: 2 where the channels double, but for the first block.
    stem_stride: of the first convolution, 1 for small images.
    binary_weights: False makes the network of the first step of training, with binary activations
      and real weights. Its state_dict loads strictly into the second step's network.

    The published ReActNet-A is ReActNet(1000, channels=PUBLISHED_CHANNELS, stem_stride=2). Sources:
    arXiv 2003.03488 and its code (the first convolution has no activation). Weights start as
    torch's convolutions do; the published code starts them in [0, 0.001], all of one sign, and
    expects the first step's.

    attention_layers: the names of the blocks, for attention matching against another network.

    Raises ValueError for channels that neither stay nor double and strides that do not fit.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *,
                 channels: Sequence[int] = (32, 64, 128, 128, 256, 256),
                 strides: Sequence[int] | None = None, stem_stride: int = 1,
                 binary_weights: bool = True) -> None:
        super().__init__()
        channels = tuple(channels)
        if len(channels) < 2:
            raise ValueError(f"ReActNet: channels of a stem and at least one block, got {channels}")
        pairs = list(zip(channels, channels[1:], strict=False))
        if strides is None:
            strides = [2 if i and before != after else 1
                       for i, (before, after) in enumerate(pairs)]
        if len(strides) != len(pairs):
            raise ValueError(f"ReActNet: {len(pairs)} blocks need as many strides, got "
                             f"{tuple(strides)}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(channels[0]))
        self.blocks = nn.Sequential(*(
            ReActBlock(before, after, stride, binary_weights=binary_weights)
            for (before, after), stride in zip(pairs, strides, strict=True)))
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(pairs)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(input))).flatten(1))


register_class("reactnet", ReActNet)
