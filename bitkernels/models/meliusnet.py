"""MeliusNet (Bethge et al. 2020): binary convolutions that add channels, and others that mend them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.concat import DenseSection, ImageInput, norm_of_concatenated
from bitkernels.models.densenet import GROWTH, DenseNetwork, normed_conv
from bitkernels.models.parts import SamePad2d, glorot_normal_
from bitkernels.models.registry import register
from bitkernels.nn import MaxPool2d


class MeliusNetBlock(nn.Module):
    """A dense block, y = conv3x3(sign(BN(x))), and an improvement block, which adds
    conv3x3(sign(BN(concat(x, y)))) to y; x is the concatenation of the inputs, to which a
    `DenseSection` appends y.

    Input: a list of (N, C, H, W) with in_channels together; output (N, 64, H, W).
    """

    of_parts = True

    def __init__(self, in_channels: int, *, binary_weights: bool = True) -> None:
        super().__init__()
        self.norm1, self.conv1 = normed_conv(in_channels, 1, binary_weights)
        self.norm2, self.conv2 = normed_conv(in_channels + GROWTH, 1, binary_weights)

    def forward(self, parts: list[Tensor]) -> Tensor:
        new = self.conv1(norm_of_concatenated(self.norm1, parts))
        return new + self.conv2(norm_of_concatenated(self.norm2, [*parts, new]))


@checked
class MeliusNet(DenseNetwork):
    """A real stem of grouped convolutions, sections of `MeliusNetBlock`s, a linear layer.

    Input (N, in_channels, H, W); output (N, num_classes). The stem divides the sides by 4, each
    section after the first by 2, rounded up.

    blocks: of each section; each adds 64 channels.
    features: to which a batch norm, a maximum of 2x2 pixels, a ReLU and a real 1x1 convolution
      bring the channels after each section but the last.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    The defaults are MeliusNet22. Source: larq_zoo.literature, structure and initialisation. Larq
    clips the latent weights to 1.3: `bitkernels.optim.clip_latent_weights(..., clip=1.3)`.

    attention_layers: the names of the sections, for attention matching against another network.

    Raises ValueError for blocks and features that do not fit each other.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *,
                 blocks: Sequence[int] = (4, 5, 4, 4), features: Sequence[int] = (160, 224, 256),
                 binary_weights: bool = True) -> None:
        super().__init__()
        if len(features) != len(blocks) - 1 or min(blocks) < 1:
            raise ValueError("MeliusNet: each section has a number of blocks, at least 1, and "
                             f"each but the last the features after it; got blocks={blocks} and "
                             f"features={features}")
        self.images = ImageInput("MeliusNet")
        self.stem = nn.Sequential(
            SamePad2d(3, 2), nn.Conv2d(in_channels, 32, 3, 2, bias=False), nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            MaxPool2d(2, ceil_mode=True))
        channels, sections = 64, []
        for i, count in enumerate(blocks):
            parts: list[nn.Module] = []
            if i:
                parts.append(nn.Sequential(
                    nn.BatchNorm2d(channels), MaxPool2d(2, ceil_mode=True), nn.ReLU(),
                    nn.Conv2d(channels, features[i - 1], 1, bias=False)))
                channels = features[i - 1]
            for _ in range(count):
                parts.append(MeliusNetBlock(channels, binary_weights=binary_weights))
                channels += GROWTH
            sections.append(DenseSection(*parts))
        self._finish(sections, channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # of a group, each of which is a layer there
                for filters in module.weight.chunk(module.groups):
                    glorot_normal_(filters)
        glorot_normal_(self.classifier.weight)


register("meliusnet22", MeliusNet, "Bethge et al. 2020, arXiv 2001.05936", top1=62.4, top5=83.9,
         preprocessing="larq")
