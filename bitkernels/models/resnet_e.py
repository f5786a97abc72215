"""BinaryResNetE18 (Bethge et al. 2019): ResNet-18 with a shortcut around every convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import (
    SamePad2d,
    glorot_normal_,
    he_normal_,
    same_max_pool,
    weight_options,
)
from bitkernels.models.registry import register
from bitkernels.models.residual import keras_layers_of, residual_body, residual_layer
from bitkernels.quantizers import SteSign

CLIP = 1.25  # of the straight-through estimators, and of the latent weights


@checked
class BinaryResNetE(nn.Module):
    """A real stem, binary residual layers, a ReLU and a real linear layer.

    Input (N, in_channels, H, W); output (N, num_classes). The stem divides the sides by 4, each
    section after the first by 2, all rounded up. No factor on the weights.

    blocks, channels: of each section, a block being one convolution: (4, 4, 4, 4) is
      BinaryResNetE18, (6, 8, 12, 6) has the sections of ResNet-34.
    stem: "imagenet": 7x7 convolution of stride 2, norm, ReLU, maximum of stride 2, norm; "cifar",
      which Larq Zoo has for images below 50 pixels: one 3x3 convolution.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Sources: arXiv 1906.08637; larq_zoo.literature, structure and initialisation. Larq clips the
    latent weights to 1.25: `bitkernels.optim.clip_latent_weights(..., clip=CLIP)`.

    attention_layers: the names of the layers, for attention matching against another network.

    Raises ValueError where blocks and channels do not have the same length, and for another stem.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *,
                 blocks: Sequence[int] = (4, 4, 4, 4),
                 channels: Sequence[int] = (64, 128, 256, 512), stem: str = "imagenet",
                 binary_weights: bool = True) -> None:
        super().__init__()
        body = residual_body(blocks, channels, partial(
            residual_layer, norm=nn.BatchNorm2d, input_quantizer=SteSign(CLIP),
            **weight_options(binary_weights, SteSign(CLIP))))
        first = channels[0]
        parts: list[nn.Module] = [nn.Conv2d(in_channels, first, 3, 1, 1, bias=False)]
        if stem == "imagenet":
            parts = [SamePad2d(7, 2), nn.Conv2d(in_channels, first, 7, 2, bias=False),
                     nn.BatchNorm2d(first), nn.ReLU(), same_max_pool(3, 2), nn.BatchNorm2d(first)]
        self.stem = nn.Sequential(*parts)
        for part in parts:
            if isinstance(part, nn.Conv2d):
                he_normal_(part.weight)
        self.blocks = body
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(body)))
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)
        glorot_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = self.relu(self.blocks(self.stem(input)))
        return self.classifier(self.pool(x).flatten(1))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "norm"}
        return [*((kinds[type(part)], part) for part in self.stem if type(part) in kinds),
                *keras_layers_of(self.blocks), ("dense", self.classifier)]


register("binary_resnet_e18", BinaryResNetE, "Bethge et al. 2019, arXiv 1906.08637",
         top1=58.32, top5=80.79, preprocessing="larq")
