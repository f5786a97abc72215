"""The learnable activations of ReActNet (Liu et al. 2020, arXiv 2003.03488)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitkernels import _onnx, quantizers
from bitkernels._arguments import integer, number, real_dtype
from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.nn.options import QuantizerLike
from bitkernels.quantizers import ApproxSign, SteSign, SwishSign

_rsign = torch.ops.bitkernels.rsign.default
_rprelu = torch.ops.bitkernels.rprelu.default


class RSign(FxLeaf):
    """sign(x + shift), with a learned shift per channel (ReActNet, eq. 1: shift = -alpha).

    Input (N, num_features, ...), of any floating dtype; output -1 and +1 in the same dtype, +1
    where not x + shift < 0. The gradient is that of `quantizer` (ste_sign, approx_sign as in the
    paper, or swish_sign) at x + shift; that of shift is summed over all dimensions but channels.
    A binary layer that follows takes input_quantizer=None.

    Thresholds that a network computes for each sample go to the operator itself:
    `torch.ops.bitkernels.rsign(x, shift)` takes a shift (N, C, 1, ..., 1) too, with its gradient.

    state_dict: shift (num_features,), 0 at first. Raises ValueError for another quantizer.
    """

    shift: nn.Parameter

    def __init__(self, num_features: int, quantizer: QuantizerLike = "approx_sign", device=None,
                 dtype=None) -> None:
        super().__init__()
        self.num_features = integer("RSign", "num_features", num_features, 0)
        self.shift = nn.Parameter(torch.zeros(self.num_features, device=device,
                                              dtype=real_dtype("RSign", dtype)))
        sign = quantizers.get(quantizer)
        if not isinstance(sign, (SteSign, ApproxSign, SwishSign)):
            raise ValueError("RSign: quantizer must be ste_sign, approx_sign or swish_sign, got "
                             f"{quantizer!r}")
        self._quantizer = repr(sign)
        self._estimator = dict(estimator=sign.estimator, clip=getattr(sign, "clip_value", None),
                               beta=getattr(sign, "beta", 5.0))

    def operator_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the operator: estimator, clip (None: none) and beta."""
        return dict(self._estimator)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            _onnx.is_exporting()
        return _rsign(input, self.shift, **self._estimator)

    def extra_repr(self) -> str:
        return f"{self.num_features}, quantizer={self._quantizer}"


class RPReLU(FxLeaf):
    """PReLU between two learned shifts per channel (ReActNet, eq. 2).

    With y = x + shift_in: y + shift_out where y > 0, else slope y + shift_out. (In the paper's
    letters gamma = -shift_in, beta = slope, zeta = shift_out.) Input (N, num_features, ...), of any
    floating dtype; same shape and dtype out.

    init: the first slope, 0.25 as `nn.PReLU`. state_dict: shift_in, slope, shift_out
    (num_features,); the shifts are 0 at first.
    """

    shift_in: nn.Parameter
    slope: nn.Parameter
    shift_out: nn.Parameter

    def __init__(self, num_features: int, init: float = 0.25, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = integer("RPReLU", "num_features", num_features, 0)
        self.init = number("RPReLU", "init", init)
        for name in ("shift_in", "slope", "shift_out"):
            empty = torch.empty(self.num_features, device=device,
                                dtype=real_dtype("RPReLU", dtype))
            setattr(self, name, nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift_in)
        nn.init.constant_(self.slope, self.init)
        nn.init.zeros_(self.shift_out)

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            _onnx.is_exporting()
        return _rprelu(input, self.shift_in, self.slope, self.shift_out)

    def extra_repr(self) -> str:
        return f"{self.num_features}, init={self.init}"
