"""BinaryAlexNet (Hubara et al. 2016): AlexNet with binary weights in every layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import (
    FlattenImage,
    SamePad2d,
    UnscaledBatchNorm1d,
    UnscaledBatchNorm2d,
    weight_options,
)
from bitkernels.models.registry import register
from bitkernels.nn import BinaryConv2d, BinaryLinear, MaxPool2d
from bitkernels.quantizers import NoOp

# Channels, side of the window, whether a maximum of 3x3 pixels by stride 2 follows.
LAYERS = ((64, 11, True), (192, 5, True), (384, 3, False), (384, 3, False), (256, 3, True))


@checked
class BinaryAlexNet(nn.Module):
    """Five convolutions and three linear layers, each followed by a batch norm without scale.

    Every layer, the first and the last too, has binary weights; all but the first, which has stride
    4, take the sign of their input. The logits are the last batch norm's values. No layer has a
    bias.

    Input (N, in_channels, image_size, image_size); output (N, num_classes).

    image_size: the side of the images, at least 57. 224 leaves 6 * 6 * 256 values to the linear
      layers.
    hidden: features of the two linear layers before the last, 4096 as published.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Source: larq_zoo.literature, structure and initialisation. Latent weights are clipped to 1 there
    (`bitkernels.optim.clip_latent_weights`). `bitkernels.nn.pack` has to leave the first layer:
    pack(model, filter=lambda name, layer: layer.pack_obstacle() is None).

    attention_layers: the batch norms after maxima, for attention matching.

    Raises ValueError for an image that is too small, RuntimeError for one of another size.
    """

    keras_head = 6  # layers with weights that Larq Zoo's files without a head lack

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, *,
                 hidden: int = 4096, binary_weights: bool = True) -> None:
        super().__init__()
        side = -(-image_size // 4)
        for *_, pooled in LAYERS:
            side = (side - 3) // 2 + 1 if pooled else side
        if side < 1:
            raise ValueError("BinaryAlexNet: image_size must be at least 57, where the last map "
                             f"has a pixel; got {image_size}")
        options: dict[str, Any] = dict(bias=False, **weight_options(binary_weights))
        features: list[nn.Module] = [SamePad2d(11, 4)]
        before, taps = in_channels, []
        for channels, kernel, pooled in LAYERS:
            first = len(features) == 1
            features.append(BinaryConv2d(
                before, channels, kernel, 4 if first else 1, 0 if first else kernel // 2,
                input_quantizer=NoOp(precision=32) if first else "ste_sign", **options))
            if pooled:
                features.append(MaxPool2d(3, 2))
                taps.append(f"features.{len(features)}")
            features.append(UnscaledBatchNorm2d(channels, eps=1e-3))
            before = channels
        self.features = nn.Sequential(*features)
        self.attention_layers = tuple(taps)
        self.flatten = FlattenImage(side, image_size)
        sizes = (side * side * before, hidden, hidden, num_classes)
        self.classifier = nn.Sequential(*(
            part for inside, out in zip(sizes, sizes[1:], strict=False)
            for part in (BinaryLinear(inside, out, **options),
                         UnscaledBatchNorm1d(out, eps=1e-3))))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(input)))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        return [("norm" if isinstance(part, nn.modules.batchnorm._BatchNorm) else "conv", part)
                for part in (*self.features, *self.classifier)
                if hasattr(part, "running_mean") or hasattr(part, "weight")]


register("binary_alexnet", BinaryAlexNet, "Hubara et al., NeurIPS 2016", top1=36.30, top5=61.53,
         preprocessing="larq")
