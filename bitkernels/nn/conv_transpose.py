"""Binary transposed convolutions: `torch.nn.ConvTranspose1d/2d` of quantized input and weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels._fx import traced_whole
from bitkernels.nn import arguments
from bitkernels.nn.layer import BinaryLayer, QuantizerLike, WeightScale
from bitkernels.nn.packed_transpose import PackedConvTranspose1d, PackedConvTranspose2d
from bitkernels.ops.binary_conv_transpose2d import by_output, spread

Zeros = Literal["zeros"]  # the only padding mode of transposed convolutions

_conv_transpose2d = torch.ops.bitkernels.binary_conv_transpose2d.default


class _BinaryConvTranspose(BinaryLayer, nn.modules.conv._ConvTransposeNd):
    def _by_output(self, weight: Tensor) -> Tensor:
        return by_output(weight, self.groups)

    def _factor(self, scale: Tensor) -> Tensor:
        return spread(scale, self.weight, self.groups)

    def _geometry(self, input: Tensor, output_size) -> tuple[Any, ...]:
        """stride, padding, output_padding, groups, dilation as `F.conv_transpose2d` takes them."""
        layer: Any = self
        output_padding = layer._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size,
            len(self.kernel_size), self.dilation)
        return self.stride, self.padding, output_padding, self.groups, self.dilation


class BinaryConvTranspose1d(_BinaryConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` of the signs of input and weight; see `BinaryConvTranspose2d`.

    Input (N, Cin, L) or (Cin, L); computed as a two-dimensional one of height 1.
    """

    _twin = PackedConvTranspose1d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int],
                 stride: int | tuple[int] = 1, padding: int | tuple[int] = 0,
                 output_padding: int | tuple[int] = 0, groups: int = 1, bias: bool = True,
                 dilation: int | tuple[int] = 1, padding_mode: Zeros = "zeros", device=None,
                 dtype=None, *, input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None) -> None:
        super().__init__(*arguments.transposed(
            type(self).__name__, 1, in_channels, out_channels, kernel_size, stride, padding,
            output_padding, groups, bias, dilation, padding_mode, device, dtype))
        self._configure(input_quantizer, weight_quantizer, weight_scale)

    @traced_whole
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            raise RuntimeError(f"BinaryConvTranspose1d: input must be (N, {self.in_channels}, L) "
                               f"or ({self.in_channels}, L), got shape {tuple(input.shape)}")
        stride, padding, output_padding, groups, dilation = geometry = self._geometry(
            input, output_size)
        if not self.on_bits:
            x, weight = self._real_operands(input)
            return F.conv_transpose1d(x, weight, self.bias, *geometry)
        input, weight = self._bit_operands(input)
        return _conv_transpose2d(
            input.unsqueeze(-2), weight.unsqueeze(-2), self.bias, (1, *stride), (0, *padding),
            (0, *output_padding), groups, (1, *dilation),
            **self.operator_arguments()).squeeze(-2)


class BinaryConvTranspose2d(_BinaryConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` of the signs of input and weight, on 1-bit arithmetic.

    output = scale * conv_transpose2d(sign(input), sign(weight)) + bias: the sums are exact in
    integers, scale and bias are applied in float32, the result has the input's dtype (under
    autocast, the autocast dtype). Constructor, shapes and state_dict keys are those of
    `nn.ConvTranspose2d`, so real and binary layers exchange checkpoints; `weight`
    (Cin, Cout / groups, kh, kw) holds the latent real weights.

    Input (N, Cin, H, W) or (Cin, H, W), of any floating dtype; `forward(input, output_size=None)`
    chooses the output padding by the output's size as `nn.ConvTranspose2d` does. For the backward
    one or two bits are kept for each input value, by estimators that need it (approx_sign,
    swish_sign) a reference to the input.

    An output pixel that no tap of a filter reaches, as with a kernel smaller than the stride, is
    the bias.

    input_quantizer, weight_quantizer, weight_scale: see `BinaryLayer`. The scale of output channel
      o is the mean of |w| over what makes it: over the Cin / groups input channels of its group and
      the taps, that is over weight[g Cin / groups : (g + 1) Cin / groups, o mod (Cout / groups)]
      with g = o // (Cout / groups). With a quantizer that is not binary the layer is
      `torch.nn.functional.conv_transpose2d` on the quantized tensors.
    padding_mode: "zeros", the only one of `nn.ConvTranspose2d`. Padding takes borders of the output
      away; there is no pad_value.

    Raises ValueError for options that do not fit, RuntimeError from the operator for inputs that do
    not.
    """

    _twin = PackedConvTranspose2d

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
                 output_padding: int | tuple[int, int] = 0, groups: int = 1, bias: bool = True,
                 dilation: int | tuple[int, int] = 1, padding_mode: Zeros = "zeros", device=None,
                 dtype=None, *, input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None) -> None:
        super().__init__(*arguments.transposed(
            type(self).__name__, 2, in_channels, out_channels, kernel_size, stride, padding,
            output_padding, groups, bias, dilation, padding_mode, device, dtype))
        self._configure(input_quantizer, weight_quantizer, weight_scale)

    @traced_whole
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        geometry = self._geometry(input, output_size)
        if not self.on_bits:
            x, weight = self._real_operands(input)
            return F.conv_transpose2d(x, weight, self.bias, *geometry)
        input, weight = self._bit_operands(input)
        return _conv_transpose2d(input, weight, self.bias, *geometry, **self.operator_arguments())
