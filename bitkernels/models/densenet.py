"""BinaryDenseNet (Bethge et al. 2019): every binary convolution adds channels, none is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.concat import DenseSection, ImageInput, norm_of_concatenated
from bitkernels.models.parts import SamePad2d, glorot_normal_, he_normal_, weight_options
from bitkernels.models.registry import register
from bitkernels.nn import BinaryConv2d, MaxPool2d
from bitkernels.quantizers import SteSign

CLIP = 1.3  # of the straight-through estimators, and of the latent weights
GROWTH = 64  # channels that a layer adds


def normed_conv(in_channels: int, dilation: int, binary_weights: bool
                ) -> tuple[nn.BatchNorm2d, BinaryConv2d]:
    """A batch norm and the 3x3 binary convolution of its signs to `GROWTH` channels, padded with
    zeros. The straight-through gradients end at |x| = 1.3."""
    conv = BinaryConv2d(in_channels, GROWTH, 3, padding=dilation, dilation=dilation, bias=False,
                        input_quantizer=SteSign(CLIP),
                        **weight_options(binary_weights, SteSign(CLIP)))
    glorot_normal_(conv.weight)
    return nn.BatchNorm2d(in_channels), conv


class DenseLayer(nn.Module):
    """conv3x3(sign(BN(x))) of the concatenation x of its inputs, which a `DenseSection` appends.

    Input: a list of (N, C, H, W) with in_channels together; output (N, 64, H, W).
    """

    of_parts = True

    def __init__(self, in_channels: int, dilation: int = 1, *, binary_weights: bool = True) -> None:
        super().__init__()
        self.norm, self.conv = normed_conv(in_channels, dilation, binary_weights)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.conv(norm_of_concatenated(self.norm, parts))


class DenseNetwork(nn.Module):
    """Images, a stem, `DenseSection`s and a linear layer."""

    images: ImageInput
    stem: nn.Module

    def _finish(self, sections: list[DenseSection], channels: int, num_classes: int) -> None:
        self.sections = nn.Sequential(*sections)
        self.attention_layers = tuple(f"sections.{i}" for i in range(len(sections)))
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = self.sections(self.stem(self.images(input)))
        return self.classifier(self.pool(self.relu(self.norm(x))).flatten(1))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind.

        A grouped convolution, which has a layer a group there, is named once for each of them.
        """
        kinds = {nn.Conv2d: "conv", BinaryConv2d: "conv", nn.BatchNorm2d: "norm",
                 nn.Linear: "dense"}
        return [(kinds[type(part)], part) for part in self.modules() if type(part) in kinds
                for _ in range(getattr(part, "groups", 1))]


@checked
class BinaryDenseNet(DenseNetwork):
    """A real stem, sections of `DenseLayer`s with real 1x1 convolutions between, a linear layer.

    Input (N, in_channels, H, W); output (N, num_classes).

    layers: of each section; each adds 64 channels.
    reduction: between two sections a batch norm, a maximum of 2x2 pixels, a ReLU and a 1x1
      convolution, which leaves this part of the channels, rounded to a multiple of 32.
    dilation: of each section's convolutions. Before a dilated section there is no maximum.
    stem: "imagenet", a 7x7 convolution of stride 2, batch norm, ReLU and a maximum of 3x3 pixels;
      "cifar", a 3x3 convolution alone, as the original has it for images below 50 pixels.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    The published networks: `create_model("binary_densenet28")`, 37, 37_dilated and 45. Source:
    larq_zoo.literature, structure and initialisation. Larq clips the latent weights to 1.3:
    `bitkernels.optim.clip_latent_weights(..., clip=CLIP)`.

    attention_layers: the names of the sections, for attention matching against another network.

    Raises ValueError for options that do not fit each other, RuntimeError for an image too small.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *,
                 layers: Sequence[int] = (6, 6, 6, 5),
                 reduction: Sequence[float] = (2.7, 2.7, 2.2),
                 dilation: Sequence[int] = (1, 1, 1, 1), stem: str = "imagenet",
                 binary_weights: bool = True) -> None:
        super().__init__()
        if len(dilation) != len(layers) or len(reduction) != len(layers) - 1:
            raise ValueError("BinaryDenseNet: each section has a number of layers and a dilation, "
                             f"and each but the last a reduction; got layers={layers}, "
                             f"dilation={dilation} and reduction={reduction}")
        if min(layers) < 1 or any(r <= 0 for r in reduction):
            raise ValueError("BinaryDenseNet: layers and dilation must be at least 1 and reduction "
                             f"above 0, got {layers}, {dilation} and {reduction}")
        least = 2 ** sum(rate == 1 for rate in dilation[1:])  # side of the map after the stem
        self.images = ImageInput("BinaryDenseNet", least if stem == "cifar" else 4 * least - 3)
        self.stem = _stem(in_channels, stem)
        channels, sections = 64, []
        for i, (count, rate) in enumerate(zip(layers, dilation, strict=True)):
            parts: list[nn.Module] = []
            if i:
                left = round(channels // reduction[i - 1] / 32) * 32
                if left < 1:
                    raise ValueError(f"BinaryDenseNet: reduction[{i - 1}]={reduction[i - 1]} "
                                     f"leaves none of {channels} channels")
                parts.append(_transition(channels, left, pool=rate == 1))
                channels = left
            for _ in range(count):
                parts.append(DenseLayer(channels, rate, binary_weights=binary_weights))
                channels += GROWTH
            sections.append(DenseSection(*parts))
        self._finish(sections, channels, num_classes)
        he_normal_(self.classifier.weight)


def _stem(in_channels: int, kind: str) -> nn.Sequential:
    if kind == "cifar":
        conv = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        he_normal_(conv.weight)
        return nn.Sequential(conv)
    conv = nn.Conv2d(in_channels, 64, 7, 2, bias=False)
    he_normal_(conv.weight)
    # Behind the ReLU zeros around the maximum are as good as nothing.
    return nn.Sequential(SamePad2d(7, 2), conv, nn.BatchNorm2d(64), nn.ReLU(),
                         SamePad2d(3, 2), MaxPool2d(3, 2))


def _transition(in_channels: int, out_channels: int, pool: bool) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    he_normal_(conv.weight)
    pools: list[nn.Module] = [MaxPool2d(2)] if pool else []
    return nn.Sequential(nn.BatchNorm2d(in_channels), *pools, nn.ReLU(), conv)


_37: dict[str, Any] = dict(layers=(6, 8, 12, 6), reduction=(3.3, 3.3, 4))
for _name, _options, _top1, _top5 in (
        ("28", {}, 60.91, 82.83), ("37", _37, 62.89, 84.19),
        ("37_dilated", dict(_37, dilation=(1, 1, 2, 4)), 64.34, 85.15),
        ("45", dict(layers=(6, 12, 14, 8), reduction=(2.7, 3.3, 4)), 64.59, 85.21)):
    register(f"binary_densenet{_name}", BinaryDenseNet, "Bethge et al. 2019, arXiv 1906.08637",
             options=_options, top1=_top1, top5=_top5, preprocessing="larq")
