"""BinaryNet, the VGG of Courbariaux et al. (2016) as Bop's CIFAR-10 experiments have it."""

from typing import Any

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import (
    UnscaledBatchNorm1d,
    UnscaledBatchNorm2d,
    glorot_normal_,
    weight_options,
)
from bitkernels.models.registry import register, register_class
from bitkernels.nn import BinaryConv2d, BinaryLinear
from bitkernels.quantizers import NoOp

EPS = 1e-3  # Keras's default


@checked
class BinaryNet(nn.Module):
    """Three pairs of 3x3 convolutions and three linear layers, all with binary weights.

    With w = width:  w, w, pool | 2w, 2w, pool | 4w, 4w, pool | 8w, 8w, num_classes. Every layer is
    followed by a batch norm without scale, after the pooling where there is one, and takes the
    sign of its input; only the first takes the image as it is, and is not padded. No layer has a
    bias. The logits are the last batch norm's values.

    Input (N, in_channels, image_size, image_size); output (N, num_classes).

    width: 128 in the publication, where a 32x32 image leaves 3 * 3 * 512 = 4608 values to the
      linear layers.
    stages: pairs of convolutions. None: 3, or as many as leave a pixel of a smaller image.
    first_padding: zeros around the image, 0 as published.
    norm_momentum: torch's (1 - Keras's), 0.01 as published. For runs of a few hundred updates 0.1
      lets the running statistics follow.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Sources: Helwegen et al., NeurIPS 2019 (arXiv 1906.02107), section 5, and its code. Trained
    there by `bitkernels.optim.Bop`, batch norms by Adam. `bitkernels.nn.pack` has to leave the
    first layer: pack(model, filter=lambda name, layer: layer.pack_obstacle() is None).

    attention_layers: the name of each stage's last batch norm, for attention matching.

    Raises ValueError for an image that is too small and options out of range.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, *,
                 width: int = 128, stages: int | None = None, first_padding: int = 0,
                 norm_momentum: float = 0.01, binary_weights: bool = True) -> None:
        super().__init__()
        size = image_size - 2 + 2 * first_padding
        possible = max(size, 1).bit_length() - 1 if size > 0 else 0
        if stages is None:
            stages = min(3, possible)
        if not 1 <= stages <= possible:
            raise ValueError(f"BinaryNet: {stages} stages do not fit images of {image_size} "
                             f"pixels, which have room for {possible}")
        options: dict[str, Any] = dict(bias=False, **weight_options(binary_weights))

        def norm(kind: type, features: int) -> nn.Module:
            return kind(features, eps=EPS, momentum=norm_momentum)

        features: list[nn.Module] = []
        channels = in_channels
        for stage in range(stages):
            for half in range(2):
                first = not features
                out = width << stage
                features.append(BinaryConv2d(
                    channels, out, 3, padding=first_padding if first else 1,
                    input_quantizer=NoOp(precision=32) if first else "ste_sign", **options))
                if half:
                    features.append(nn.MaxPool2d(2))
                features.append(norm(UnscaledBatchNorm2d, out))
                channels = out
        size >>= stages
        self.features = nn.Sequential(*features)
        self.attention_layers = tuple(f"features.{5 * stage + 4}" for stage in range(stages))
        self.flatten = nn.Flatten()
        hidden = 8 * width
        self.classifier = nn.Sequential(
            BinaryLinear(channels * size * size, hidden, **options),
            norm(UnscaledBatchNorm1d, hidden),
            BinaryLinear(hidden, hidden, **options),
            norm(UnscaledBatchNorm1d, hidden),
            BinaryLinear(hidden, num_classes, **options),
            norm(UnscaledBatchNorm1d, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                glorot_normal_(module.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(input)))


register_class("binarynet", BinaryNet)
register("binarynet", BinaryNet, "Courbariaux et al. 2016, arXiv 1602.02830, as in Helwegen et al. "
         "2019, arXiv 1906.02107", image_size=32, num_classes=10, preprocessing="cifar")
