"""The Real-to-Binary network (Martinez et al. 2020): factors of its channels that depend on the
input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.concat import ImageInput
from bitkernels.models.parts import (
    SamePad2d,
    glorot_normal_,
    he_normal_,
    same_max_pool,
    weight_options,
)
from bitkernels.models.registry import register
from bitkernels.nn import BinaryConv2d, SameConv2d

REDUCTION = 8  # channels to a value in the middle of a gate


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class ChannelGate(nn.Module):
    """sigmoid(W2 relu(W1 m)) of the mean m over an image's pixels.

    Input (N, in_channels, H, W); output (N, out_channels, 1, 1), between 0 and 1.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_channels, in_channels // REDUCTION, bias=False)
        self.expand = nn.Linear(in_channels // REDUCTION, out_channels, bias=False)
        he_normal_(self.reduce.weight)
        he_normal_(self.expand.weight)

    def forward(self, input: Tensor) -> Tensor:
        gates = self.expand(self.reduce(input.mean((2, 3))).relu()).sigmoid()
        return gates[:, :, None, None]


class RealToBinaryLayer(nn.Module):
    """With b = BN(x): PReLU(gate(b) conv3x3(sign(b))) + shortcut(x).

    The shortcut is x, or where the channels change the mean of 2x2 pixels, a real 1x1 convolution
    and a batch norm. Input (N, in_channels, H, W); output (N, out_channels, H, W), or half the
    sides, rounded up, where the channels change. Padded with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, *, binary_weights: bool = True) -> None:
        super().__init__()
        options = weight_options(binary_weights)
        self.norm = _norm(in_channels)
        self.conv: BinaryConv2d
        self.shortcut: nn.Sequential | None = None
        if in_channels == out_channels:
            self.conv = BinaryConv2d(in_channels, out_channels, 3, padding=1, bias=False, **options)
        else:
            self.conv = SameConv2d(in_channels, out_channels, 3, 2, bias=False, **options)
            pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            glorot_normal_(pointwise.weight)
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), pointwise,
                _norm(out_channels))
        glorot_normal_(self.conv.weight)
        self.gate = ChannelGate(in_channels, out_channels)
        self.act = nn.PReLU(out_channels, init=0.0)

    def forward(self, input: Tensor) -> Tensor:
        x = self.norm(input)
        x = self.act(self.conv(x) * self.gate(x))
        return x + (input if self.shortcut is None else self.shortcut(input))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        layers: list[tuple[str, nn.Module]] = [
            ("norm", self.norm), ("dense", self.gate.reduce), ("dense", self.gate.expand),
            ("conv", self.conv), ("prelu", self.act)]
        if self.shortcut is not None:
            layers.insert(4, ("conv", self.shortcut[1]))
            layers.append(("norm", self.shortcut[2]))
        return layers


@checked
class RealToBinaryNet(nn.Module):
    """A real stem, blocks of two `RealToBinaryLayer`s, a real linear layer.

    Input (N, in_channels, H, W); output (N, num_classes). Each section after the first halves the
    sides, rounded up.

    blocks, channels: of each section. channels: multiples of 8, each section's its own.
    stem: "imagenet", a 7x7 convolution of stride 2, batch norm, PReLU and a maximum of 3x3 pixels;
      "cifar", for small images, a 3x3 convolution, batch norm and PReLU.
    binary_weights: False keeps the weights real, with the same state_dict keys. The training in
      stages, the first with tanh in place of signs, is the recipe "real-to-binary".

    The defaults are the published network. Source: larq_zoo.literature, structure and
    initialisation; the stem's PReLU is the code's, whose comment says ReLU.

    attention_layers: the names of the blocks, for attention matching against another network.

    Raises ValueError for options that do not fit.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *,
                 blocks: Sequence[int] = (2, 2, 2, 2),
                 channels: Sequence[int] = (64, 128, 256, 512), stem: str = "imagenet",
                 binary_weights: bool = True) -> None:
        super().__init__()
        if len(blocks) != len(channels) or min(blocks) < 1:
            raise ValueError("RealToBinaryNet: each section has a number of blocks, at least 1, "
                             f"and of channels; got blocks={blocks} and channels={channels}")
        if any(c % REDUCTION for c in channels) or len(set(channels)) < len(channels):
            raise ValueError("RealToBinaryNet: channels must be different multiples of "
                             f"{REDUCTION}, got {channels}")
        first = nn.Conv2d(in_channels, channels[0], *((7, 2) if stem == "imagenet" else (3, 1)),
                          bias=False)
        glorot_normal_(first.weight)
        self.images = ImageInput("RealToBinaryNet")
        self.stem = nn.Sequential(
            SamePad2d(first.kernel_size[0], first.stride[0]), first, _norm(channels[0]),
            nn.PReLU(channels[0], init=0.0), *([same_max_pool(3, 2)] if stem == "imagenet" else []))
        body, before = [], channels[0]
        for count, width in zip(blocks, channels, strict=True):
            for _ in range(count):
                body.append(nn.Sequential(*(
                    RealToBinaryLayer(c, width, binary_weights=binary_weights)
                    for c in (before, width))))
                before = width
        self.blocks = nn.Sequential(*body)
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(body)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, num_classes)
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = self.blocks(self.stem(self.images(input)))
        return self.classifier(self.pool(x).flatten(1))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        _, conv, norm, act, *_ = self.stem
        layers: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", norm), ("prelu", act)]
        for part in self.blocks.modules():
            if isinstance(part, RealToBinaryLayer):
                layers += part.keras_layers()
        return [*layers, ("dense", self.classifier)]


register("real_to_binary_net", RealToBinaryNet, "Martinez et al. 2020, openreview BJg4NgBKvH",
         top1=65.01, top5=85.72, preprocessing="larq")
