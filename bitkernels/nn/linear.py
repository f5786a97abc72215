"""Binary fully connected layer: `torch.nn.Linear` whose input and weight are quantized first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels._fx import traced_whole
from bitkernels.nn import arguments
from bitkernels.nn.layer import BinaryLayer, QuantizerLike, WeightScale
from bitkernels.nn.packed import PackedLinear

_linear = torch.ops.bitkernels.binary_linear.default


class BinaryLinear(BinaryLayer, nn.Linear):
    """`torch.nn.Linear` of the signs of input and weight, on 1-bit arithmetic.

    output = scale * (sign(input) @ sign(weight).T) + bias: the product is exact in integers, scale
    and bias are applied in float32, the result has the input's dtype (under autocast, the autocast
    dtype). Constructor, shapes and state_dict keys are those of `nn.Linear`.

    Input (..., in_features), of any floating dtype; output (..., out_features).
    input_quantizer, weight_quantizer, weight_scale: see `BinaryLayer`. With a quantizer that is not
    binary the layer is `torch.nn.functional.linear` on the quantized tensors.

    Raises ValueError for options that do not fit, RuntimeError from the operator for inputs that do
    not.
    """

    _twin = PackedLinear

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None,
                 dtype=None, *, input_quantizer: QuantizerLike = "ste_sign",
                 weight_quantizer: QuantizerLike = "ste_sign",
                 weight_scale: WeightScale = None) -> None:
        super().__init__(*arguments.linear(type(self).__name__, in_features, out_features, bias,
                                           device, dtype))
        self._configure(input_quantizer, weight_quantizer, weight_scale)

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if not self.on_bits:
            x, weight = self._real_operands(input)
            return F.linear(x, weight, self.bias)
        input, weight = self._bit_operands(input)
        return _linear(input, weight, self.bias, **self.operator_arguments())
