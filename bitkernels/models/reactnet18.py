"""ReActNet-18 and -34 (Liu et al. 2020): ResNets with a shortcut and shifts at every layer."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import weight_options
from bitkernels.models.published import Place, renamed
from bitkernels.models.registry import register, register_class
from bitkernels.nn import BinaryConv2d, BinaryResidualBlock, MaxPool2d, RPReLU, RSign


def reactnet18_block(in_channels: int, out_channels: int, stride: int = 1, *,
                     binary_weights: bool = True) -> BinaryResidualBlock:
    """RPReLU(BN(conv3x3(RSign(x))) + shortcut(x)), as one operator in training.

    The shortcut is x, or where the shape changes the mean of 2x2 pixels, a real 1x1 convolution and
    a batch norm. Input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride),
    ceil(W / stride)).
    """
    conv = BinaryConv2d(in_channels, out_channels, 3, stride, 1, bias=False, input_quantizer=None,
                        **weight_options(binary_weights, "ste_sign", "detached"))
    shortcut: nn.Module | None = None
    if stride > 1 or in_channels != out_channels:
        # ceil_mode: an odd image has as many pixels as its 3x3 convolution.
        shortcut = nn.Sequential(
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
    return BinaryResidualBlock(conv, nn.BatchNorm2d(out_channels), sign=RSign(in_channels),
                               act=RPReLU(out_channels), shortcut=shortcut)


@checked
class ReActNet18(nn.Module):
    """A real 7x7 convolution, 16 binary residual blocks and a real linear layer.

    Input (N, in_channels, H, W); output (N, num_classes). The weights of the binary convolutions
    are scaled by their mean magnitude per channel, a constant for the gradient. The stem divides
    the sides by 4, each section after the first by 2.

    blocks, channels: of each section.
    stem: "imagenet", the published 7x7 convolution of stride 2 and maximum; "cifar", for small
      images, a 3x3 convolution of stride 1 and no maximum.
    binary_weights: False makes the network of the first step of training, with the same state_dict
      keys.

    The published networks are ReActNet18(1000), 11,704,424 parameters, and ReActNet18(1000,
    blocks=(6, 8, 12, 6)), ReActNet-34. Sources: arXiv 2003.03488 and its code (the stem has no
    activation). Weights start as torch's convolutions do. An image with an odd side is averaged
    with the last row and column alone.

    attention_layers: the names of the blocks, for attention matching against another network.

    Raises ValueError where blocks and channels do not have the same length, and for another stem.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *,
                 blocks: Sequence[int] = (4, 4, 4, 4),
                 channels: Sequence[int] = (64, 128, 256, 512), stem: str = "imagenet",
                 binary_weights: bool = True) -> None:
        super().__init__()
        if len(blocks) != len(channels):
            raise ValueError("ReActNet18: each section has a number of blocks and of channels, "
                             f"got blocks={blocks} and channels={channels}")
        small = stem == "cifar"
        window = (3, 1, 1) if small else (7, 2, 3)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels[0], *window, bias=False),
                                  nn.BatchNorm2d(channels[0]),
                                  *([] if small else [MaxPool2d(3, 2, 1)]))
        body: list[nn.Module] = []
        before = channels[0]
        for section, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            for i in range(count):
                body.append(reactnet18_block(before, width, 2 if section and not i else 1,
                                             binary_weights=binary_weights))
                before = width
        self._sections = blocks
        self.blocks = nn.Sequential(*body)
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(body)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(input))).flatten(1))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the published code with the names and shapes of this class.

        Filters may be (Cout, Cin, k, k) or flat (N, 1), called weight or weights. Other names stay
        as they are.
        """
        return renamed(self, state, self._published)

    def _published(self, key: str) -> Place | None:
        """Where a tensor of the published code is here."""
        match = re.fullmatch(r"(?:layer(\d+)\.(\d+)\.)?(.+)", key)
        assert match is not None
        section, index, rest = match.groups()
        if section is None or not 0 < int(section) <= len(self._sections):
            part, _, last = rest.partition(".")
            layer = {"conv1": "stem.0", "bn1": "stem.1", "fc": "classifier"}.get(part)
            return (f"{layer}.{last}", 0) if layer else None
        before = sum(self._sections[:int(section) - 1])
        part, _, last = rest.rpartition(".")
        where = f"{_NORMS[part]}.{last}" if part in _NORMS else _PARTS.get(rest)
        if where is None or int(index) >= self._sections[int(section) - 1]:
            return None
        return f"blocks.{before + int(index)}.{where}", 0


_PARTS = {"move0.bias": "sign.shift", "binary_conv.weight": "conv.weight",
          "binary_conv.weights": "conv.weight", "move1.bias": "act.shift_in",
          "prelu.weight": "act.slope", "move2.bias": "act.shift_out",
          "downsample.1.weight": "shortcut.1.weight"}
_NORMS = {"bn1": "norm", "downsample.2": "shortcut.2"}

register_class("reactnet-18", ReActNet18)
for _name, _blocks, _top1 in (("reactnet18", (4, 4, 4, 4), 65.9),
                              ("reactnet34", (6, 8, 12, 6), None)):
    register(_name, ReActNet18, "Liu et al. 2020, arXiv 2003.03488", top1=_top1,
             options=dict(blocks=_blocks))
