"""ReActNet (Liu et al. 2020): learned shifts around signs and activations, a shortcut per layer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels.models.arguments import checked
from bitkernels.models.parts import weight_options
from bitkernels.models.published import Place, placed, renamed
from bitkernels.models.registry import register, register_class
from bitkernels.nn import BinaryConv2d, BinaryResidualBlock, RPReLU, RSign

PUBLISHED_CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class Repeat(nn.Module):
    """(N, C, H, W) twice along the channels: the shortcut around what doubles them."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat((input, input), 1)


class RealDoubling(nn.Module):
    """RPReLU(BN(conv1x1(x)) + (x, x)), the convolution real, with twice as many channels.

    Input (N, channels, H, W); output (N, 2 * channels, H, W).
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.act = RPReLU(2 * channels)
        self.shortcut = Repeat()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(input)) + self.shortcut(input))


@checked
class ReActBlock(nn.Module):
    """A binary 3x3 convolution, then a binary 1x1 one, each a `BinaryResidualBlock`.

        h = spatial(x)   = RPReLU(BN(conv3x3(RSign(x))) + x)    x averaged over 2x2 if stride is 2
        y = pointwise(h) = RPReLU(BN(conv1x1(RSign(h))) + h)

    Where out_channels is twice in_channels, the 1x1 convolution has twice as many filters and its
    shortcut is (h, h). That is the published pair of branches side by side, which share RSign and
    RPReLU (as the published code does; the paper draws them apart).

    Input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride), ceil(W / stride)).

    real_groups: where the channels double, a real 1x1 convolution of that many groups, without
      RSign, in place of the binary one. None: binary.

    state_dict: spatial.* and pointwise.*, as of `BinaryResidualBlock`. That of earlier versions
    (sign1, conv1, ..., conv2.0, conv2.1) loads too.

    Raises ValueError where out_channels is neither in_channels nor twice that, and for a stride
    that is neither 1 nor 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *,
                 real_groups: int | None = None, binary_weights: bool = True) -> None:
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"ReActBlock: {in_channels} channels can become {in_channels} or "
                             f"{2 * in_channels}, not {out_channels}")
        if stride not in (1, 2):
            raise ValueError(f"ReActBlock: stride must be 1 or 2, got {stride!r}")
        options: dict[str, Any] = dict(bias=False, input_quantizer=None, **weight_options(
            binary_weights, "ste_sign", "detached"))
        doubles = out_channels != in_channels
        # ceil_mode: an odd image has as many pixels as its 3x3 convolution.
        self.spatial = BinaryResidualBlock(
            BinaryConv2d(in_channels, in_channels, 3, stride, 1, **options),
            nn.BatchNorm2d(in_channels), sign=RSign(in_channels), act=RPReLU(in_channels),
            shortcut=(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2
                      else None))
        self.pointwise = RealDoubling(in_channels, real_groups) if doubles and real_groups else \
            BinaryResidualBlock(
                BinaryConv2d(in_channels, out_channels, 1, **options),
                nn.BatchNorm2d(out_channels), sign=RSign(in_channels), act=RPReLU(out_channels),
                shortcut=Repeat() if doubles else None)

    def forward(self, input: Tensor) -> Tensor:
        return self.pointwise(self.spatial(input))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str,
                              *args: Any) -> None:
        old = {key: state_dict.pop(key) for key in list(state_dict)
               if key.startswith(prefix) and _EARLIER.fullmatch(key, len(prefix))}
        state_dict.update(placed(old, self.state_dict(prefix=prefix),
                                 lambda key: _earlier(key, prefix, old)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def read_earlier_packed(self, name: str, layers: dict[str, Any], state: dict[str, Tensor]
                            ) -> None:
        """In earlier files the layers lie side by side, the branches of a block that doubles the
        channels too, whose filters are those of one convolution now."""
        own = f"{name}."
        branches = [layers[key] for key in (f"{own}conv2.0", f"{own}conv2.1") if key in layers]
        if f"{own}conv1" not in layers or not branches or branches[-1] != branches[0]:
            return
        for i in range(len(branches)):
            del layers[f"{own}conv2.{i}"]
        layers[f"{own}spatial.conv"] = layers.pop(f"{own}conv1")
        layers[f"{own}pointwise.conv"] = {
            **branches[0], "out_channels": len(branches) * branches[0]["out_channels"]}
        for part in ("spatial", "pointwise"):
            if isinstance(block := getattr(self, part), BinaryResidualBlock):
                layers[own + part] = block.arguments()
        parts: dict[str, list[Tensor]] = {}
        for key in sorted(state):
            place = _earlier(key, own, state) if key.startswith(own) else None
            if place is not None and place[0] not in state:
                parts.setdefault(place[0], []).append(state.pop(key))
        # What has no channels is num_batches_tracked, the same in both branches.
        state.update({key: torch.cat(values) if values[0].dim() else values[0]
                      for key, values in parts.items()})


_EARLIER = re.compile(r"(sign|conv|norm|act)([12])\.(?:([01])\.)?(\w+)")


def _earlier(key: str, prefix: str, state: Mapping[str, Tensor]) -> Place | None:
    """Where a tensor that a block had until 0.1 is now; prefix: the block's name and a dot."""
    match = _EARLIER.fullmatch(key, len(prefix))
    if match is None:
        return None
    part, number, branch, rest = match.groups()
    halves = branch is not None and f"{prefix}conv2.1.weight" in state
    return (f"{prefix}{'spatial' if number == '1' else 'pointwise'}.{part}.{rest}",
            int(branch) + 1 if halves else 0)


@checked
class ReActNet(nn.Module):
    """A real convolution, `ReActBlock`s and a real linear layer on the mean of each channel.

    Input (N, in_channels, H, W); output (N, num_classes). The weights of the binary convolutions
    are scaled by their mean magnitude per channel, a constant for the gradient.

    channels: of the stem, then of each block; a block keeps or doubles them.
    strides: of each block. None: 2 where the channels double, but for the first block.
    stem_stride: of the first convolution, 1 for small images.
    real_groups: where the channels double, a real 1x1 convolution of that many groups in place of
      the binary one: 4 in ReActNet-B, 1 in ReActNet-C. None: binary, as in ReActNet-A.
    binary_weights: False makes the network of the first step of training, with binary activations
      and real weights. Its state_dict loads strictly into the second step's network.

    The published ReActNet-A is ReActNet(1000, channels=PUBLISHED_CHANNELS, stem_stride=2). Sources:
    arXiv 2003.03488 and its code (the first convolution has no activation). B and C are described
    in the paper alone: that the first block is one of those with a real convolution, without RSign
    before it, follows from the published operations. Weights start as torch's convolutions do; the
    published code starts them in [0, 0.001], all of one sign, and expects the first step's.

    attention_layers: the names of the blocks, for attention matching against another network.

    Raises ValueError for channels that neither stay nor double and strides that do not fit.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *,
                 channels: Sequence[int] = (32, 64, 128, 128, 256, 256),
                 strides: Sequence[int] | None = None, stem_stride: int = 1,
                 real_groups: int | None = None, binary_weights: bool = True) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"ReActNet: channels of a stem and at least one block, got {channels}")
        pairs = list(zip(channels, channels[1:], strict=False))
        if strides is None:
            strides = [2 if i and before != after else 1
                       for i, (before, after) in enumerate(pairs)]
        if len(strides) != len(pairs):
            raise ValueError(f"ReActNet: {len(pairs)} blocks need as many strides, got "
                             f"{tuple(strides)}")
        if real_groups is not None and any(
                before % real_groups for before, after in pairs if before != after):
            raise ValueError("ReActNet: real_groups must divide the channels of the blocks that "
                             f"double them, got {real_groups} for channels={channels}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(channels[0]))
        self.blocks = nn.Sequential(*(
            ReActBlock(before, after, stride, real_groups=real_groups,
                       binary_weights=binary_weights)
            for (before, after), stride in zip(pairs, strides, strict=True)))
        self.attention_layers = tuple(f"blocks.{i}" for i in range(len(pairs)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(input))).flatten(1))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the code of ReActNet or AdamBNN with the names and shapes of this class.

        Filters may be (Cout, Cin, k, k) or flat (N, 1), called weight or weights. Those of earlier
        versions of this class are taken too. Other names stay as they are.
        """
        return renamed(self, state, lambda key: _published(key, state))


_PARTS = {"move11.bias": "spatial.sign.shift", "binary_3x3.weight": "spatial.conv.weight",
          "binary_3x3.weights": "spatial.conv.weight", "move12.bias": "spatial.act.shift_in",
          "prelu1.weight": "spatial.act.slope", "move13.bias": "spatial.act.shift_out",
          "move21.bias": "pointwise.sign.shift", "binary_pw.weight": "pointwise.conv.weight",
          "binary_pw.weights": "pointwise.conv.weight", "move22.bias": "pointwise.act.shift_in",
          "prelu2.weight": "pointwise.act.slope", "move23.bias": "pointwise.act.shift_out"}
_NORMS = {"bn1": ("spatial", 0), "bn2": ("pointwise", 0), "bn2_1": ("pointwise", 1),
          "bn2_2": ("pointwise", 2)}


def _published(key: str, state: Mapping[str, Tensor]) -> Place | None:
    """Where a tensor of the published code, or of an earlier version of ours, is here."""
    first, _, rest = key.partition(".")
    number, _, rest = rest.partition(".")
    if first == "fc":
        return f"classifier.{number}", 0
    if first == "blocks":
        return _earlier(key, f"{first}.{number}.", state)
    if first != "feature" or not number.isdigit():
        return None
    part, _, last = rest.rpartition(".")
    if number == "0":
        layer = {"conv1": "stem.0", "bn1": "stem.1"}.get(part)
        return (f"{layer}.{last}", 0) if layer else None
    block = f"blocks.{int(number) - 1}."
    if part in _NORMS:
        half, which = _NORMS[part]
        return f"{block}{half}.norm.{last}", which
    if part in ("binary_pw_down1", "binary_pw_down2") and last in ("weight", "weights"):
        return f"{block}pointwise.conv.weight", int(part[-1])
    return (block + _PARTS[rest], 0) if rest in _PARTS else None


register_class("reactnet", ReActNet)
for _name, _groups, _top1 in (("reactnet_a", None, 69.4), ("reactnet_b", 4, 70.1),
                              ("reactnet_c", 1, 71.4)):
    register(_name, ReActNet, "Liu et al. 2020, arXiv 2003.03488", top1=_top1,
             options=dict(channels=PUBLISHED_CHANNELS, stem_stride=2, real_groups=_groups))
