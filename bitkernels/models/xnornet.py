"""XNOR-Net (Rastegari et al. 2016): AlexNet whose binary weights are scaled by their mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import FlattenImage, SamePad2d, UnscaledBatchNorm2d, weight_options
from bitkernels.models.registry import register
from bitkernels.nn import BinaryConv2d, MaxPool2d

# Channels, side of the window, padding, whether a maximum of 3x3 pixels by stride 2 follows.
LAYERS = ((256, 5, 2, True), (384, 3, 1, False), (384, 3, 1, False), (256, 3, 1, True))


@checked
class XNORNet(nn.Module):
    """A real convolution, six binary ones, two of them AlexNet's linear layers, and a real layer.

    Input (N, in_channels, image_size, image_size); output (N, num_classes). A binary convolution
    takes the sign of a batch norm without scale; its weights are scaled by the mean magnitude of
    each channel's clipped latent weights, through which the gradient flows too. No layer has a
    bias.

    image_size: the side of the images, at least 217, which like 224 leaves one pixel of the last
      map; of a larger map all pixels go to the last layer.
    hidden: channels of the two convolutions that stand for linear layers, 4096 as published.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Source: larq_zoo.literature, structure and initialisation; L2 decay of 5e-7 on all weights and
    latent weights clipped to 1 there (`bitkernels.optim.clip_latent_weights`).

    attention_layers: the batch norms after maxima, for attention matching.

    Raises ValueError for an image that is too small, RuntimeError for one of another size.
    """

    keras_head = 3  # layers with weights that Larq Zoo's files without a head lack

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, *,
                 hidden: int = 4096, binary_weights: bool = True) -> None:
        super().__init__()
        layers = (*LAYERS, (hidden, 6, 0, False), (hidden, 1, 0, False))
        side = (-(-image_size // 4) - 3) // 2 + 1
        for _, kernel, padding, pooled in layers:
            side += 2 * padding - kernel + 1
            side = (side - 3) // 2 + 1 if pooled else side
        if side < 1:
            raise ValueError("XNORNet: image_size must be at least 217, where the last map has a "
                             f"pixel; got {image_size}")
        options: dict[str, Any] = dict(bias=False,
                                       **weight_options(binary_weights, "ste_sign", "xnor"))
        self.stem = nn.Sequential(
            SamePad2d(11, 4), nn.Conv2d(in_channels, 96, 11, 4, bias=False),
            UnscaledBatchNorm2d(96, eps=1e-5), nn.ReLU(), MaxPool2d(3, 2),
            UnscaledBatchNorm2d(96, eps=1e-4))
        features: list[nn.Module] = []
        before, taps = 96, ["stem.5"]
        for i, (channels, kernel, padding, pooled) in enumerate(layers):
            features.append(BinaryConv2d(before, channels, kernel, 1, padding, **options))
            if pooled:
                features.append(MaxPool2d(3, 2))
                taps.append(f"features.{len(features)}")
            features.append(UnscaledBatchNorm2d(channels, eps=1e-4 if i < 5 else 1e-3))
            before = channels
        self.features = nn.Sequential(*features)
        self.attention_layers = tuple(taps)
        self.relu = nn.ReLU()
        self.flatten = FlattenImage(side, image_size)
        self.classifier = nn.Linear(side * side * before, num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.relu(self.features(self.stem(input)))))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        layers = [("norm" if isinstance(part, UnscaledBatchNorm2d) else "conv", part)
                  for part in (*self.stem, *self.features)
                  if isinstance(part, (UnscaledBatchNorm2d, nn.Conv2d))]
        return [*layers, ("dense", self.classifier)]


register("xnornet", XNORNet, "Rastegari et al. 2016, arXiv 1603.05279", top1=44.96, top5=69.18,
         preprocessing="larq")
