"""BNext (Guo et al. 2022): binary convolutions that are gated, 72 to 81 % on ImageNet."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import weight_options
from bitkernels.models.published import Place, renamed
from bitkernels.models.registry import register
from bitkernels.nn import BinaryConv2d, BinaryResidualBlock, NoShortcut, RSign
from bitkernels.quantizers import SteSign

CLIP = 1.5  # of the straight-through estimator of activations, and of the latent weights
SOFT = 1e-7  # from this temperature on the published code does not compute with signs of weights

# Of the stem, then of each block.
CHANNELS = {
    "t": (32, 64, *[128] * 2, *[256] * 2, *[512] * 6, *[1024] * 2),
    "s": (48, 96, *[192] * 2, *[384] * 2, *[768] * 6, *[1536] * 2),
    "m": (48, 96, *[192] * 4, *[384] * 4, *[768] * 8, *[1536] * 4),
    "l": (64, 128, *[256] * 4, *[512] * 4, *[1024] * 16, *[2048] * 4),
}


class BNextHalf(nn.Module):
    """A binary convolution whose output is gated, normalized and added to its input.

        r = x, or PReLU(x) if modulated; averaged over 2x2 where stride is 2
        b = PReLU(BN(conv(sign(x + shift))))
        g = sigmoid(linear(ReLU(linear(mean of scale * x + (1 - scale) * b))))
        y = BN(g * b) + r, or BN(g * b * r) + r if modulated

    The mean is that of each channel, x averaged too where stride is 2. Input (N, channels, H, W);
    output (N, channels, ceil(H / stride), ceil(W / stride)). state_dict: branch.* as of
    `BinaryResidualBlock`, gate.*, scale (channels,), norm.*, and act.weight if modulated.

    A training forward clamps scale to [0, 1] in place, as published. An evaluation uses it as it
    is where the window is 3x3, clamped where it is 1x1, which differs after a last update.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, *,
                 modulated: bool = False, binary_weights: bool = True) -> None:
        super().__init__()
        conv = BinaryConv2d(channels, channels, kernel_size, stride, kernel_size // 2, bias=False,
                            input_quantizer=None, **weight_options(binary_weights, SteSign(None)))
        nn.init.normal_(conv.weight, std=1e-3)
        self.branch = BinaryResidualBlock(
            conv, nn.BatchNorm2d(channels), sign=RSign(channels, SteSign(CLIP)),
            act=nn.PReLU(channels), shortcut=NoShortcut())
        # ceil_mode: an odd image has as many pixels as its 3x3 convolution.
        self.pool = (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2
                     else nn.Identity())
        self.act = nn.PReLU(channels) if modulated else None
        self.gate = nn.Sequential(nn.Conv2d(channels, channels // 8, 1), nn.ReLU(),
                                  nn.Conv2d(channels // 8, channels, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.full((channels,), 0.5))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        pooled = self.pool(input)
        residual = pooled if self.act is None else self.pool(self.act(input))
        x = self.branch(input)
        scale = self._mixture()
        mean = scale * pooled.mean((2, 3)) + (1 - scale) * x.mean((2, 3))
        x = x * self.gate(mean[:, :, None, None])
        return self.norm(x if self.act is None else x * residual) + residual

    def _mixture(self) -> Tensor:
        if self.training:
            # Not counted as a change by autograd: an earlier forward may wait for its backward.
            self.scale.data.clamp_(0, 1)
            return self.scale
        return self.scale.clamp(0, 1) if self.branch.conv.kernel_size == (1, 1) else self.scale


@checked
class BNextBlock(nn.Module):
    """A `BNextHalf` of 3x3, then one of 1x1, or two side by side where the channels double.

    Input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, modulated: bool,
                 binary_weights: bool = True) -> None:
        super().__init__()
        self.spatial = BNextHalf(in_channels, 3, stride, modulated=modulated,
                                 binary_weights=binary_weights)
        self.pointwise = nn.ModuleList(BNextHalf(in_channels, 1, binary_weights=binary_weights)
                                       for _ in range(out_channels // in_channels))

    def forward(self, input: Tensor) -> Tensor:
        x = self.spatial(input)
        if len(self.pointwise) == 1:
            return self.pointwise[0](x)
        return torch.cat([half(x) for half in self.pointwise], 1)


@checked
class BNext(nn.Module):
    """A real 3x3 convolution, `BNextBlock`s, a PReLU and a real linear layer on channels' means.

    Input (N, in_channels, H, W); output (N, num_classes). The weights of the binary convolutions
    have no factor. Every second block is modulated, beginning with the second.

    channels: of the stem, then of each block; a block keeps or doubles them. The published ones
      are `CHANNELS`: "t", "s", "m" and "l". Blocks that double have stride 2, but for the first.
    stem: "imagenet", a first convolution of stride 2; "cifar", of stride 1, for small images.
    binary_weights: False keeps the weights real, with the same state_dict keys.

    Sources: arXiv 2211.12933 and its code, github.com/hpi-xnor/BNext, of whose parameters those
    that it never uses are not here: BNext-T has 8,960 fewer of its 30,862,236, S 13,440 of
    68,594,614. An image with an odd side is averaged with the last row and column alone; the
    published code takes sizes whose stem's output has sides that are multiples of 16. In training
    the weights are signs from the start; published, they are clamp(w / T) with T falling from 1 by
    a tenth an epoch. The latent weights are clipped to 1.5 there:
    `bitkernels.optim.clip_latent_weights(..., clip=CLIP)`.

    attention_layers: the names of the blocks, for attention matching against another network.

    Raises ValueError for channels that neither stay nor double, or are fewer than 8, and
    for another stem.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, *,
                 channels: Sequence[int] = CHANNELS["t"], stem: str = "imagenet",
                 binary_weights: bool = True) -> None:
        super().__init__()
        pairs = list(zip(channels, channels[1:], strict=False))
        if not pairs or min(channels) < 8 or any(b not in (a, 2 * a) for a, b in pairs):
            raise ValueError("BNext: channels of a stem and at least one block, at least 8, each "
                             f"as many as before or twice as many; got {channels}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, 2 if stem == "imagenet" else 1, 1, bias=False),
            nn.BatchNorm2d(channels[0]))
        self.blocks = nn.Sequential(*(
            BNextBlock(before, after, 2 if i and before != after else 1, modulated=i % 2 == 1,
                       binary_weights=binary_weights)
            for i, (before, after) in enumerate(pairs)))
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(pairs)))
        self.act = nn.PReLU(channels[-1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, input: Tensor) -> Tensor:
        x = self.act(self.blocks(self.stem(input)))
        return self.classifier(self.pool(x).flatten(1))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the published code with the names and shapes of this class.

        Without the temperatures and the PReLUs that the code never uses; other names stay as they
        are. Raises ValueError where a temperature is missing or so large that the published
        network's weights are not binary.
        """
        soft = {}
        for key in state:
            if key.endswith(".binary_conv.weight"):
                name = f"{key.removesuffix('weight')}temperature"
                if name not in state:
                    raise ValueError(f"BNext: {name} is missing, so whether the weights of this "
                                     "file are binary cannot be told")
                if not bool((state[name] < SOFT).all()):
                    soft[name] = float(state[name].max())
        if soft:
            name, value = next(iter(soft.items()))
            raise ValueError(f"BNext: the weights of this file are not binary: {name} is {value:g}"
                             f", not below {SOFT:g} ({len(soft)} such temperatures); it was saved "
                             "before the published training had made them signs")
        used = {key: value for key, value in state.items() if not self._unused(key)}
        return renamed(self, used, _published)

    def _unused(self, key: str) -> bool:
        """Whether the published code has this entry and computes nothing with it."""
        if key == "feature.0.prelu.weight" or re.fullmatch(
                r"feature\.\d+\.\w+\.binary_(conv|activation)\.temperature", key):
            return True
        match = re.fullmatch(r"feature\.(\d+)\.(Attention|FFN|FFN_1|FFN_2)\.activation1\.weight",
                             key)
        return match is not None and (match[2] != "Attention" or int(match[1]) % 2 == 1)


_HALVES = {"Attention": "spatial", "FFN": "pointwise.0", "FFN_1": "pointwise.0",
           "FFN_2": "pointwise.1"}
_PARTS = {"move.bias": "branch.sign.shift", "binary_conv.weight": "branch.conv.weight",
          "activation1.weight": "act.weight", "activation2.weight": "branch.act.weight",
          "scale": "scale", "se.se.1.weight": "gate.0.weight", "se.se.1.bias": "gate.0.bias",
          "se.se.3.weight": "gate.2.weight", "se.se.3.bias": "gate.2.bias"}
_NORMS = {"norm1": "branch.norm", "norm2": "norm"}


def _published(key: str) -> Place | None:
    """Where a tensor of the published code is here."""
    if key in ("fc.weight", "fc.bias"):
        return f"classifier.{key[3:]}", 0
    if key == "prelu.weight":
        return "act.weight", 0
    match = re.fullmatch(r"feature\.(\d+)\.(\w+)\.(.+)", key)
    if match is None:
        return None
    number, half, rest = match.groups()
    if number == "0":
        layer = {"conv1": "stem.0", "bn1": "stem.1"}.get(half)
        return (f"{layer}.{rest}", 0) if layer else None
    part, _, last = rest.rpartition(".")
    where = f"{_NORMS[part]}.{last}" if part in _NORMS else _PARTS.get(rest)
    if where is None or half not in _HALVES:
        return None
    return f"blocks.{int(number) - 1}.{_HALVES[half]}.{where}", 0


for _size, _top1 in (("t", 72.4), ("s", 76.1), ("m", 78.3), ("l", 80.57)):
    register(f"bnext_{_size}", BNext, "Guo et al. 2022, arXiv 2211.12933", top1=_top1,
             preprocessing="bnext", options=dict(channels=CHANNELS[_size]))
