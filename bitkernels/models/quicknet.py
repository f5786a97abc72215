"""QuickNet (Larq Zoo, version 1.0): residual binary convolutions that are fast where they run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import SamePad2d, glorot_normal_, he_normal_, weight_options
from bitkernels.models.registry import register, register_class
from bitkernels.nn import BinaryConv2d, BinaryResidualBlock, MaxPool2d
from bitkernels.quantizers import SteSign

CLIP = 1.25  # of the straight-through estimators, and of the latent weights


@checked
class QuickNetBlock(BinaryResidualBlock):
    """y = x + BN(ReLU(conv3x3(sign(x)))), the padding +1, no factor on the weights.

    Input and output (N, channels, H, W). The straight-through gradients end at |x| = 1.25.
    """

    def __init__(self, channels: int, *, binary_weights: bool = True) -> None:
        conv = BinaryConv2d(channels, channels, 3, padding=1, bias=False, pad_value=1,
                            input_quantizer=SteSign(CLIP),
                            **weight_options(binary_weights, SteSign(CLIP)))
        super().__init__(conv, nn.BatchNorm2d(channels), relu=True)
        glorot_normal_(self.conv.weight)

    def read_earlier_packed(self, name: str, layers: dict[str, Any], state: dict[str, Any]) -> None:
        """In earlier files it is no block with options, but always the layers that it has now."""
        if f"{name}.conv" in layers:
            layers.setdefault(name, self.arguments())


@checked
class QuickNetTransition(nn.Module):
    """ReLU, antialiased max pooling by 2, a real 1x1 convolution and a batch norm.

    The pooling is a 2x2 maximum of stride 1, then a fixed blur of stride 2, (1 2 1)^T (1 2 1) / 16.
    Input (N, in_channels, H, W) of at least 2x2; output (N, out_channels, H // 2, W // 2).

    The blur is in the state_dict (blur, (in_channels, 1, 3, 3)) only where another one was loaded.
    """

    blur: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.pool = MaxPool2d(2, stride=1)
        self.pad = SamePad2d(3, 2)
        self.in_channels = in_channels
        self.register_buffer("blur", self.binomial(), persistent=False)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        glorot_normal_(self.conv.weight)

    def forward(self, input: Tensor) -> Tensor:
        x = self.pad(self.pool(self.relu(input)))
        x = nn.functional.conv2d(x, self.blur.to(x.dtype), stride=2, groups=len(self.blur))
        return self.norm(self.conv(x))

    def binomial(self, device: torch.device | None = None) -> Tensor:
        """The blur as published, (in_channels, 1, 3, 3)."""
        line = torch.tensor([1.0, 2.0, 1.0], device=device) / 4
        return line.outer(line).expand(self.in_channels, 1, 3, 3).clone()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str,
                              local_metadata: Mapping[str, Any], *args: Any) -> None:
        loaded = f"{prefix}blur" in state_dict
        weight = state_dict.get(f"{prefix}conv.weight")
        if self.blur.is_meta and local_metadata.get("assign_to_params_buffers") and (
                weight is not None):  # it goes where the tensors of the state are
            self.blur = self.binomial(weight.device).to(self.blur.dtype)
        if not loaded and "blur" not in self._non_persistent_buffers_set:
            self.blur.copy_(self.binomial())
        self.register_buffer("blur", self.blur, persistent=loaded)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@checked
class QuickNet(nn.Module):
    """A cheap real stem, sections of `QuickNetBlock`s with transitions between, a linear layer.

    Input (N, in_channels, H, W); output (N, num_classes). Each section after the first halves the
    image, so its side before the first transition must be at least 2 ** (sections - 1).

    blocks, filters: of each section.
    stem_strides: of the stem's two 3x3 convolutions; (1, 1) for small images.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    The published QuickNet is QuickNet(1000, blocks=(4, 4, 4, 4), filters=(64, 128, 256, 512),
    stem_strides=(2, 2)); Small has filters (32, 64, 256, 512), Large blocks (6, 8, 12, 6). Source:
    larq_zoo.sota, structure and initialisation (of the depthwise convolution: Keras's default).
    Larq clips the latent weights to 1.25: `bitkernels.optim.clip_latent_weights(..., clip=CLIP)`.

    attention_layers: the names of the sections, for attention matching against another network.

    Raises ValueError for sections that do not fit each other and filters[0] not a multiple of 4.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *,
                 blocks: Sequence[int] = (2, 2, 2), filters: Sequence[int] = (64, 128, 256),
                 stem_strides: tuple[int, int] = (1, 1), binary_weights: bool = True) -> None:
        super().__init__()
        if len(blocks) != len(filters):
            raise ValueError(f"QuickNet: each section has a number of blocks and of filters, got "
                             f"blocks={blocks} and filters={filters}")
        if filters[0] % 4:
            raise ValueError("QuickNet: filters[0] must be a multiple of 4, the stem has a quarter "
                             f"of them; got {filters[0]}")
        self.stem = _stem(in_channels, filters[0], stem_strides)
        sections = []
        for i, (count, channels) in enumerate(zip(blocks, filters, strict=True)):
            parts: list[nn.Module] = []
            if i:
                parts.append(QuickNetTransition(filters[i - 1], channels))
            parts += [QuickNetBlock(channels, binary_weights=binary_weights)
                      for _ in range(count)]
            sections.append(nn.Sequential(*parts))
        self.sections = nn.Sequential(*sections)
        self.attention_layers = tuple(f"sections.{i}" for i in range(len(sections)))
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(filters[-1], num_classes)
        glorot_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = self.sections(self.stem(input))
        return self.classifier(self.pool(self.relu(x)).flatten(1))

    def keras_layers(self) -> list[tuple[str, nn.Module]]:
        """The layers with weights in the order of Larq Zoo's Keras model, each with its kind."""
        _, full, norm1, _, _, depthwise, norm2, pointwise, norm3 = self.stem
        layers: list[tuple[str, nn.Module]] = [
            ("conv", full), ("norm", norm1), ("depthwise", depthwise), ("norm", norm2),
            ("conv", pointwise), ("norm", norm3)]
        for part in self.sections.modules():
            if isinstance(part, QuickNetTransition):
                layers.append(("blur", part))
            if isinstance(part, (QuickNetTransition, QuickNetBlock)):
                layers += [("conv", part.conv), ("norm", part.norm)]
        return [*layers, ("dense", self.classifier)]


def _stem(in_channels: int, out_channels: int, strides: tuple[int, int]) -> nn.Sequential:
    quarter = out_channels // 4
    full = nn.Conv2d(in_channels, quarter, 3, strides[0], bias=False)
    depthwise = nn.Conv2d(quarter, quarter, 3, strides[1], groups=quarter, bias=False)
    pointwise = nn.Conv2d(quarter, out_channels, 1, bias=False)
    he_normal_(full.weight)
    nn.init.xavier_uniform_(depthwise.weight)
    he_normal_(pointwise.weight)
    options: dict[str, Any] = dict(eps=1e-3, momentum=0.01)
    return nn.Sequential(
        SamePad2d(3, strides[0]), full, nn.BatchNorm2d(quarter, **options), nn.ReLU(),
        SamePad2d(3, strides[1]), depthwise,
        nn.BatchNorm2d(quarter, affine=False, **options),
        pointwise, nn.BatchNorm2d(out_channels, **options))


_PAPER = "Bannink et al. 2021, arXiv 2011.09398"
_SECTIONS = (64, 128, 256, 512)
register_class("quicknet", QuickNet)
for _name, _blocks, _filters, _top1, _top5 in (
        ("quicknet_small", (4, 4, 4, 4), (32, 64, 256, 512), 59.4, 81.8),
        ("quicknet", (4, 4, 4, 4), _SECTIONS, 63.3, 84.6),
        ("quicknet_large", (6, 8, 12, 6), _SECTIONS, 66.9, 87.0)):
    register(_name, QuickNet, _PAPER, top1=_top1, top5=_top5, preprocessing="larq",
             options=dict(blocks=_blocks, filters=_filters, stem_strides=(2, 2)))
