"""Binary convolutions: `torch.nn.Conv1d/2d/3d` whose input and weight are quantized first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import _onnx
from bitkernels._arguments import choice
from bitkernels._fx import traced_whole
from bitkernels.nn import arguments
from bitkernels.nn.layer import BinaryLayer, QuantizerLike, WeightScale
from bitkernels.nn.options import quantized
from bitkernels.nn.packed import PackedConv1d, PackedConv2d

_conv2d = torch.ops.bitkernels.binary_conv2d.default
_conv2d_padding = torch.ops.bitkernels.binary_conv2d.padding

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _BinaryConv(BinaryLayer, nn.modules.conv._ConvNd):
    def __setattr__(self, name: str, value: Any) -> None:
        where = type(self).__name__
        if name == "pad_value":
            value = arguments.pad_value_of(where, value, self.padding_mode)
        elif name == "padding_mode":
            choice(where, name, value, arguments.PADDING_MODES)
            arguments.pad_value_of(where, self.pad_value, value)
        super().__setattr__(name, value)

    @property
    def _reversed_padding_repeated_twice(self) -> list[int]:
        """As `F.pad` takes it, of the padding as it is now; torch keeps that of the constructor,
        which its convolutions do not look at where they pad with zeros."""
        padding, pads = self.padding, []
        if padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"{type(self).__name__}: padding='same' needs stride=1, got "
                             f"{self.stride}")
        for i in reversed(range(len(self.kernel_size))):
            if padding == "same":
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                pads += [total // 2, total - total // 2]
            else:
                pads += [0, 0] if isinstance(padding, str) else [padding[i]] * 2
        return pads

    @_reversed_padding_repeated_twice.setter
    def _reversed_padding_repeated_twice(self, pads: list[int]) -> None:
        """By torch's constructor."""

    def _pads_for(self, input: Tensor) -> Sequence[int]:
        """The padding of this input as `F.pad` takes it."""
        return self._reversed_padding_repeated_twice

    def _real_forward(self, input: Tensor, convolution) -> Tensor:
        """The PyTorch convolution of the quantized tensors, padded after quantization."""
        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if not self.pad_value:
                return self._conv_forward(x, weight, bias)
            x = F.pad(x, self._pads_for(x), value=float(self.pad_value))
            return convolution(x, weight, bias, self.stride, 0, self.dilation, self.groups)

        signs = self.binarization.input_is_sign and self.binarization.weight_is_sign
        if signs and _onnx.is_exporting():
            dot = convolve(quantized(self.input_quantizer, input), self._quantized_weight(), None)
            shape = (-1, *[1] * len(self.kernel_size))
            return _onnx.epilogue(dot, self.scale(), self.bias, shape).to(dot.dtype)
        return convolve(*self._real_operands(input), self.bias)


class BinaryConv1d(_BinaryConv, nn.Conv1d):
    """`torch.nn.Conv1d` of the signs of input and weight; see `BinaryConv2d`.

    Input (N, Cin, L) or (Cin, L); computed as a two-dimensional convolution of height 1.
    """

    _twin = PackedConv1d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int],
                 stride: int | tuple[int] = 1, padding: str | int | tuple[int] = 0,
                 dilation: int | tuple[int] = 1, groups: int = 1, bias: bool = True,
                 padding_mode: PaddingMode = "zeros", device=None, dtype=None, *,
                 input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None, pad_value: int = 0) -> None:
        super().__init__(*arguments.convolution(
            type(self).__name__, 1, in_channels, out_channels, kernel_size, stride, padding,
            dilation, groups, bias, padding_mode, device, dtype))
        self.pad_value = pad_value
        self._configure(input_quantizer, weight_quantizer, weight_scale)

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            raise RuntimeError(f"BinaryConv1d: input must be (N, {self.in_channels}, L) or "
                               f"({self.in_channels}, L), got shape {tuple(input.shape)}")
        if not self.on_bits:
            return self._real_forward(input, F.conv1d)
        input, weight = self._bit_operands(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,)
        convolution = _conv2d_padding if isinstance(padding, str) else _conv2d
        return convolution(
            input.unsqueeze(-2), weight.unsqueeze(-2), self.bias, (1, self.stride[0]),
            padding if isinstance(padding, str) else (0, padding[0]),
            (1, self.dilation[0]), self.groups, **self.operator_arguments()).squeeze(-2)


class BinaryConv2d(_BinaryConv, nn.Conv2d):
    """`torch.nn.Conv2d` of the signs of input and weight, on 1-bit arithmetic.

    output = scale * conv2d(sign(input), sign(weight)) + bias: the convolution is exact in integers,
    scale and bias are applied in float32, the result has the input's dtype (under autocast, the
    autocast dtype). Constructor, shapes, padding and state_dict keys are those of `nn.Conv2d`, so
    real and binary layers exchange checkpoints; `weight` holds the latent real weights.

    Input (N, Cin, H, W) or (Cin, H, W), of any floating dtype. For the backward one or two bits are
    kept for each input value, by estimators that need it (approx_sign, swish_sign) a reference to
    the input.

    pad_value: what padding_mode "zeros" pads the quantized input with: 0 (contributes nothing), -1
      or +1 (the QuickNet of Larq Zoo). The modes "reflect", "replicate" and "circular" pad the
      input as `nn.Conv2d` does.
    input_quantizer, weight_quantizer, weight_scale: see `BinaryLayer`. With a quantizer that is not
      binary (DoReFa, SteTern, SteHeaviside, NoOp(precision=32), ...) the layer is
      `torch.nn.functional.conv2d` on the quantized tensors.

    Raises ValueError for options that do not fit, RuntimeError from the operator for inputs that do
    not.
    """

    _twin = PackedConv2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
                 dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True,
                 padding_mode: PaddingMode = "zeros", device=None, dtype=None, *,
                 input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None, pad_value: int = 0) -> None:
        super().__init__(*arguments.convolution(
            type(self).__name__, 2, in_channels, out_channels, kernel_size, stride, padding,
            dilation, groups, bias, padding_mode, device, dtype))
        self.pad_value = pad_value
        self._configure(input_quantizer, weight_quantizer, weight_scale)

    def pads_of(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """The padding in pixels, of an image of this height and width: top, bottom, left, right."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return top, bottom, left, right

    def _padding_of(self, input: Tensor) -> Any:
        """The operator's argument for this input."""
        return self.padding

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if not self.on_bits:
            return self._real_forward(input, F.conv2d)
        input, weight = self._bit_operands(input)
        padding = self._padding_of(input)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        convolution = _conv2d_padding if isinstance(padding, str) else _conv2d
        return convolution(input, weight, self.bias, self.stride, padding, self.dilation,
                           self.groups, **self.operator_arguments())


class BinaryConv3d(_BinaryConv, nn.Conv3d):
    """`torch.nn.Conv3d` of the quantized input and weight; see `BinaryConv2d` for the options.

    It trains the same networks, but computes on real numbers: `torch.nn.functional.conv3d` of -1
    and +1. It has no packed twin.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 kernel_size: int | tuple[int, int, int], stride: int | tuple[int, int, int] = 1,
                 padding: str | int | tuple[int, int, int] = 0,
                 dilation: int | tuple[int, int, int] = 1, groups: int = 1, bias: bool = True,
                 padding_mode: PaddingMode = "zeros", device=None, dtype=None, *,
                 input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None, pad_value: int = 0) -> None:
        super().__init__(*arguments.convolution(
            type(self).__name__, 3, in_channels, out_channels, kernel_size, stride, padding,
            dilation, groups, bias, padding_mode, device, dtype))
        self.pad_value = pad_value
        self._configure(input_quantizer, weight_quantizer, weight_scale)

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        return self._real_forward(input, F.conv3d)
