"""A batch norm before the sign, for layers whose input cannot be made negative otherwise."""

from __future__ import annotations

import math

from torch import Tensor, nn

from bitkernels import quantizers
from bitkernels._arguments import integer, real_dtype
from bitkernels.nn.options import QuantizerLike
from bitkernels.quantizers import SteSign, is_binary

_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class NormSign(nn.Module):
    """sign(batch norm(x)), the order of XNOR-Net (Rastegari et al. 2016): an input quantizer.

    For inputs that are never negative, as those from a ReLU: every sign is +1 there, while the sign
    of the distance from a channel's mean says something. Input (N, num_features, ...) with
    `dims` more dimensions, or the same without N; with dims=0 (..., num_features), as for
    `BinaryLinear`. Output -1 and +1, of the same shape and dtype.

    quantizer: the sign and its gradient, one that is binary. state_dict: norm.weight, norm.bias and
    the running statistics. Raises ValueError for another quantizer, and for dims beyond 3.
    """

    precision = 1
    binary = True

    def __init__(self, num_features: int, dims: int, quantizer: QuantizerLike = "ste_sign",
                 device=None, dtype=None) -> None:
        super().__init__()
        self.dims = integer("NormSign", "dims", dims, 0, len(_NORMS) - 1)
        self.norm = _NORMS[self.dims](integer("NormSign", "num_features", num_features, 0),
                                      device=device, dtype=real_dtype("NormSign", dtype))
        if self.norm.running_mean is not None and self.norm.running_var is not None:
            # Those of the ReLU of a standard normal, so that an untrained network is not constant.
            nn.init.constant_(self.norm.running_mean, 1 / math.sqrt(2 * math.pi))
            nn.init.constant_(self.norm.running_var, 0.5 - 1 / (2 * math.pi))
        sign = quantizers.get(quantizer)
        if not is_binary(sign):
            raise ValueError(f"NormSign: quantizer must return -1 and +1, got {quantizer!r}")
        self.quantizer = SteSign(None) if sign is None else sign

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if not self.dims:
            x = input.reshape(-1, input.shape[-1])
        elif input.dim() == self.dims + 1:
            x = input.unsqueeze(0)
        return self.quantizer(self.norm(x).view(input.shape))

    def extra_repr(self) -> str:
        return f"dims={self.dims}"
