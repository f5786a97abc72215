"""Bi-Real Net (Liu et al. 2018): ResNets with a real shortcut around every binary convolution."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitkernels._arguments import choice
from bitkernels.models.arguments import checked
from bitkernels.models.parts import SamePad2d, glorot_normal_, same_max_pool, weight_options
from bitkernels.models.published import Place, renamed
from bitkernels.models.registry import register
from bitkernels.models.residual import keras_layers_of, residual_body, residual_layer
from bitkernels.nn import MaxPool2d

STYLES = ("larq", "pytorch")


@checked
class BiRealNet(nn.Module):
    """A real 7x7 convolution, binary residual layers and a real linear layer; no activations.

    Input (N, in_channels, H, W); output (N, num_classes). The stem divides the sides by 4, each
    section after the first by 2, all rounded up. Activations pass gradients by `approx_sign`, the
    weights are scaled by their mean magnitude per channel.

    blocks, channels: of each section, a block being one convolution: (4, 4, 4, 4) is Bi-Real-18,
      (6, 8, 12, 6) Bi-Real-34.
    stem: "imagenet", a 7x7 convolution of stride 2 and a maximum; "cifar", for small images, a 3x3
      convolution of stride 1 and no maximum.
    style: whose details, and whose published weights:
      "larq"     Larq Zoo: TensorFlow's padding, norms with eps 1e-3 and momentum 0.2, and the
                 gradient of a weight multiplied by its scale ("magnitude_aware")
      "pytorch"  the authors' PyTorch code: padding on both sides alike, torch's default norms, and
                 gradients without the scale ("detached")
      The state_dict keys are the same; weights of one style are wrong in the other.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Sources: arXiv 1808.00278; larq_zoo.literature; github.com/liuzechun/Bi-Real-net. Convolutions
    start glorot-normal, as Larq Zoo's. Latent weights are clipped to 1 there
    (`bitkernels.optim.clip_latent_weights`), and not in the PyTorch code, whose sign(0) is 0, not
    +1.

    attention_layers: the names of the layers, for attention matching against another network.

    Raises ValueError where blocks and channels do not have the same length, for another stem or
    style.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *,
                 blocks: Sequence[int] = (4, 4, 4, 4),
                 channels: Sequence[int] = (64, 128, 256, 512), stem: str = "imagenet",
                 style: str = "larq", binary_weights: bool = True) -> None:
        super().__init__()
        choice("BiRealNet", "style", style, STYLES)
        self.style, self.blocks_of = style, blocks
        same = style == "larq"
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.2) if same else nn.BatchNorm2d
        body = residual_body(blocks, channels, partial(
            residual_layer, norm=norm, same=same, input_quantizer="approx_sign", **weight_options(
                binary_weights, "ste_sign", "magnitude_aware" if same else "detached")))
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        first = nn.Conv2d(in_channels, channels[0], kernel, stride, bias=False)
        self.stem = nn.Sequential(
            SamePad2d(kernel, stride) if same else nn.ZeroPad2d(kernel // 2), first,
            norm(channels[0]),
            nn.Identity() if stem == "cifar" else
            same_max_pool(3, 2) if same else MaxPool2d(3, 2, 1))
        glorot_normal_(first.weight)
        self.blocks = body
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(body)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(input))).flatten(1))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind.

        Raises ValueError for style "pytorch".
        """
        if self.style != "larq":
            raise ValueError("BiRealNet: files of Larq Zoo are for style='larq'; this network has "
                             "the padding and norms of style='pytorch'")
        return [("conv", self.stem[1]), ("norm", self.stem[2]), *keras_layers_of(self.blocks),
                ("dense", self.classifier)]

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the authors' PyTorch code with the names and shapes of this class.

        Filters may be (Cout, Cin, 3, 3) or flat (N, 1), called weight or weights. Other names stay
        as they are. Raises ValueError for style "larq".
        """
        if self.style != "pytorch":
            raise ValueError("these are weights of the authors' PyTorch code, for "
                             "style='pytorch'; this network has the padding and norms of "
                             "style='larq'")
        return renamed(self, state, self._published)

    def _published(self, key: str) -> Place | None:
        """Where a tensor of the published code is here."""
        match = re.fullmatch(r"layer([1-9]\d*)\.(\d+)\.(.+)", key)
        if match is None:
            part, _, last = key.partition(".")
            layer = {"conv1": "stem.1", "bn1": "stem.2", "fc": "classifier"}.get(part)
            return (f"{layer}.{last}", 0) if layer else None
        section, index, rest = int(match[1]), int(match[2]), match[3]
        for theirs, ours in (("binary_conv.weights", "conv.weight"), ("binary_conv.", "conv."),
                             ("bn1.", "norm."), ("downsample.", "shortcut.")):
            if rest.startswith(theirs) and section <= len(self.blocks_of) and (
                    index < self.blocks_of[section - 1]):
                before = sum(self.blocks_of[:section - 1])
                return f"blocks.{before + index}.{ours}{rest.removeprefix(theirs)}", 0
        return None


_PAPER = "Liu et al. 2018, arXiv 1808.00278"
_PYTORCH: dict[str, Any] = dict(style="pytorch", blocks=(6, 8, 12, 6))
register("birealnet18", BiRealNet, _PAPER, top1=57.47, top5=79.84, preprocessing="larq")
register("birealnet34", BiRealNet, _PAPER, top1=62.2, top5=83.9, options=_PYTORCH)
