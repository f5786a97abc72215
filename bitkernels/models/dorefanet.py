"""DoReFa-Net (Zhou et al. 2016): AlexNet with binary weights and activations of two bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitkernels._dispatch import with_gradient_of
from bitkernels._fx import traced_whole
from bitkernels.models.arguments import checked
from bitkernels.models.parts import (
    FlattenImage,
    UnscaledBatchNorm1d,
    UnscaledBatchNorm2d,
    same_max_pool,
    weight_options,
)
from bitkernels.models.registry import register
from bitkernels.nn import BinaryConv2d, BinaryLinear, MaxPool2d
from bitkernels.quantizers import DoReFa, Quantizer, SteSign, clamp

# Channels, side of the window, padding of the maximum of 3x3 pixels by stride 2 that follows.
LAYERS = ((256, 5, "same"), (384, 3, "same"), (384, 3, None), (256, 3, "valid"))


class LayerMeanSign(Quantizer):
    """Sign times the mean magnitude of the whole weight, with the gradient of the identity.

    DoReFa-Net's weights of one bit (Zhou et al. 2016, eq. 7): a value per layer, not per channel,
    and no part of the gradient.
    """

    precision = 1

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return with_gradient_of(SteSign(None)(x.detach()) * x.detach().abs().mean(), x)


class Clip01(nn.Module):
    """x clamped to [0, 1], with gradient 1 at both bounds."""

    def forward(self, input: Tensor) -> Tensor:
        return clamp(input, 0, 1)


@checked
class DoReFaNet(nn.Module):
    """A real convolution, four convolutions and two linear layers of few bits, a real linear layer.

    The layers of few bits round their input to 0, 1/3, 2/3, 1 and have binary weights with one
    scale a layer. They compute on real numbers: their operands are not all -1 and +1, and
    `bitkernels.nn.pack` leaves them.

    Input (N, in_channels, image_size, image_size); output (N, num_classes).

    image_size: the side of the images, at least 44. 224 leaves 6 * 6 * 256 values to the linear
      layers.
    hidden: features of the two linear layers before the last, 4096 as published.
    activation_bits: of the inputs of the layers of few bits, 2 as published.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Source: larq_zoo.literature, structure and initialisation.

    attention_layers: the batch norms of the four convolutions, for attention matching.

    Raises ValueError for an image that is too small, RuntimeError for one of another size.
    """

    keras_head = 5  # layers with weights that Larq Zoo's files without a head lack

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, *,
                 hidden: int = 4096, activation_bits: int = 2,
                 binary_weights: bool = True) -> None:
        super().__init__()
        side = (image_size - 12) // 4 + 1
        for *_, pooled in LAYERS:
            side = {"same": -(-side // 2), "valid": (side - 3) // 2 + 1, None: side}[pooled]
        if side < 1:
            raise ValueError("DoReFaNet: image_size must be at least 44, where the last map has a "
                             f"pixel; got {image_size}")

        def options() -> dict[str, Any]:
            return dict(bias=False, input_quantizer=DoReFa(activation_bits),
                        **weight_options(binary_weights, LayerMeanSign()))

        features: list[nn.Module] = [nn.Conv2d(in_channels, 96, 12, 4)]
        before, taps = 96, []
        for channels, kernel, pooled in LAYERS:
            features.append(BinaryConv2d(before, channels, kernel, 1, kernel // 2, **options()))
            taps.append(f"features.{len(features)}")
            features.append(UnscaledBatchNorm2d(channels, eps=1e-4))
            if pooled == "same":
                features.append(same_max_pool(3, 2))
            elif pooled == "valid":
                features.append(MaxPool2d(3, 2))
            before = channels
        self.features = nn.Sequential(*features)
        self.attention_layers = tuple(taps)
        self.flatten = FlattenImage(side, image_size)
        self.classifier = nn.Sequential(
            BinaryLinear(side * side * before, hidden, **options()),
            UnscaledBatchNorm1d(hidden, eps=1e-4),
            BinaryLinear(hidden, hidden, **options()), UnscaledBatchNorm1d(hidden, eps=1e-4),
            Clip01(), nn.Linear(hidden, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(input)))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        kinds = ((UnscaledBatchNorm2d, "norm"), (UnscaledBatchNorm1d, "norm"),
                 (nn.Conv2d, "conv"), (nn.Linear, "dense"))
        return [(kind, part) for part in (*self.features, *self.classifier)
                for cls, kind in kinds if isinstance(part, cls)]


register("dorefanet", DoReFaNet, "Zhou et al. 2016, arXiv 1606.06160", top1=53.39, top5=76.50,
         preprocessing="larq")
