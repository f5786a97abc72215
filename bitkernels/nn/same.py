"""Binary convolutions with TensorFlow's padding "same" at any stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bitkernels._arguments import choice
from bitkernels.nn.conv import BinaryConv2d
from bitkernels.nn.layer import QuantizerLike, WeightScale
from bitkernels.nn.packed import PackedConv2d


def same_pads(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
              dilation: Sequence[int] = (1, 1)) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) for an image of `size` (height, width), by TensorFlow's "same".

    The output is ceil(size / stride); where the total is odd, the bottom and the right get the
    more. A 3x3 window of stride 2 pads an even side by (0, 1), an odd one by (1, 1).
    """
    pads: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    top, bottom, left, right = pads
    return top, bottom, left, right


class PackedSameConv2d(PackedConv2d):
    """A packed `SameConv2d`; made by its `pack()`, or empty to load a state_dict into."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1,
                 padding: str = "same", dilation=1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", device=None, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias,
                         padding_mode, device, **options)
        self.__dict__["padding"] = choice(type(self).__name__, "padding", padding, ("same",))

    def pads_of(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        return same_pads(size, self.kernel_size, self.stride, self.dilation)


class SameConv2d(BinaryConv2d):
    """`BinaryConv2d` whose output has ceil(H / stride) by ceil(W / stride) pixels, as in Larq.

    It is padded with zeros, which contribute nothing, by `same_pads` of each input: where the total
    is odd, more at the bottom and the right. torch's own padding="same" takes no stride, and its
    integers pad both sides alike. At stride 1 with an odd kernel it is `BinaryConv2d` with
    padding=kernel_size // 2. Arguments, gradients, `pack` and state_dict are those of
    `BinaryConv2d`; graphs made by torch.export are of the sizes modulo the stride they were made
    with.

    Input (N, Cin, H, W) or (Cin, H, W), of any floating dtype.
    """

    _twin = PackedSameConv2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int | tuple[int, int] = 1, dilation: int | tuple[int, int] = 1,
                 groups: int = 1, bias: bool = True, device=None, dtype=None, *,
                 input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias,
                         device=device, dtype=dtype, input_quantizer=input_quantizer,
                         weight_quantizer=weight_quantizer, weight_scale=weight_scale)
        self.padding = "same"

    # No padding but that of each image. The property of the base class raises for a stride, and
    # torch.jit.trace and inspect.getmembers read all attributes.
    _reversed_padding_repeated_twice: Any = (0, 0, 0, 0)

    def pads_of(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        return same_pads(size, self.kernel_size, self.stride, self.dilation)

    def _padding_of(self, input: Tensor) -> tuple[int, int, int, int]:
        return self.pads_of(input.shape[-2:])

    def _pads_for(self, input: Tensor) -> tuple[int, int, int, int]:
        top, bottom, left, right = self._padding_of(input)
        return left, right, top, bottom

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, self._pads_for(input)), weight, bias, self.stride, 0,
                        self.dilation, self.groups)
