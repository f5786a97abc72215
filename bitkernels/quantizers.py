"""Quantizers: what a layer does to its input and its weight, and how gradients pass through it.

The eight quantizers of Larq (Geiger and Plumerai, JOSS 2020; docs.larq.dev/larq/api/quantizers),
with its class names, arguments, defaults and string aliases. Each takes a real tensor of any shape
(float16, bfloat16, float32 or float64) and returns one of the same shape, dtype and device.

Every sign is +1 unless x < 0: 0, -0.0 and NaN are +1. A straight-through gradient is 1 where
|x| <= clip_value, the boundary included, and 0 elsewhere and at NaN; what the backward needs of x
is kept as one bit an element.

`precision` is the number of bits of a quantized value. `binary` says that every value is -1 or +1,
which is what the 1-bit operators need; a custom quantizer with `precision = 1` is taken to be so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitkernels._arguments import choice, flag, integer, number
from bitkernels._dispatch import apply
from bitkernels._estimators import EstimatedSign, Round, clamp, straight_through
from bitkernels._fx import FxLeaf, traced_whole

__all__ = [
    "ApproxSign",
    "DoReFa",
    "MagnitudeAwareSign",
    "NoOp",
    "SteHeaviside",
    "SteSign",
    "SteTern",
    "SwishSign",
    "get",
    "is_binary",
]

Quantize = Callable[[Tensor], Tensor]

class Quantizer(FxLeaf):
    """Base of the quantizers here. Arguments are fixed: layers read them once.

    Raises AttributeError when an argument is assigned later; give the layer a new quantizer.
    """

    precision: int
    binary: bool = False
    estimator: str | None = None  # the operators' name of this quantizer, where they have one
    _arguments: tuple[str, ...] = ()

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.__dict__.update(arguments)
        self._arguments = tuple(arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._arguments:
            raise AttributeError(
                f"{type(self).__name__}.{name} is fixed at construction; build a new quantizer")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._arguments)


def _checked_clip(name: str, clip_value: float | None) -> float | None:
    return clip_value if clip_value is None else number(name, "clip_value", clip_value, 0,
                                                        finite=False)


class SteSign(Quantizer):
    """Sign with the straight-through estimator of BinaryNet (Courbariaux et al. 2016, eq. 4).

    Forward +1 unless x < 0, then -1. Gradient 1 where |x| <= clip_value, else 0; clip_value None
    lets all gradients pass. Alias "ste_sign". Raises ValueError for a negative clip_value.
    """

    precision = 1
    binary = True
    estimator = "ste_sign"
    clip_value: float | None

    def __init__(self, clip_value: float | None = 1.0) -> None:
        super().__init__(clip_value=_checked_clip("SteSign", clip_value))

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, "sign", self.clip_value)


class ApproxSign(Quantizer):
    """Sign with the gradient of a piecewise quadratic (Bi-Real Net, Liu et al. 2018, eq. 5).

    Forward +1 unless x < 0, then -1. Gradient 2 - 2|x| where |x| <= 1, else 0. Alias "approx_sign".
    """

    precision = 1
    binary = True
    estimator = "approx_sign"

    def __init__(self) -> None:
        super().__init__()

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return apply(EstimatedSign, x, "approx_sign", 0.0)


class SwishSign(Quantizer):
    """Sign with the gradient of SignSwish (BNN+, Darabi et al. 2018, eq. 5).

    Forward +1 unless x < 0, then -1. Gradient beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta
    x)), which is beta at 0 and negative in the tails. Alias "swish_sign". Raises ValueError for a
    beta that is not above 0 and finite.
    """

    precision = 1
    binary = True
    estimator = "swish_sign"
    beta: float

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__(beta=number("SwishSign", "beta", beta, above=0))

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return apply(EstimatedSign, x, "swish_sign", self.beta)


class MagnitudeAwareSign(Quantizer):
    """Sign times the mean magnitude s of each output channel, as Larq trains Bi-Real Net's weights.

    s = mean |x| over all dimensions but the first, the output channels of a PyTorch weight (Larq's
    kernels have them last), and is no function of x for the gradient. Forward s where not x < 0,
    else -s. Gradient s where |x| <= clip_value, else 0: it is multiplied by s, unlike that of
    Bi-Real Net and ReActNet (see `weight_scale` in bitkernels.nn). Alias "magnitude_aware_sign".
    Takes x of at least one dimension. Raises ValueError for a negative clip_value.
    """

    precision = 1
    clip_value: float | None

    def __init__(self, clip_value: float | None = 1.0) -> None:
        super().__init__(clip_value=_checked_clip("MagnitudeAwareSign", clip_value))

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, "sign", self.clip_value) * mean_magnitude(x.detach())


class SteHeaviside(Quantizer):
    """1 where x > 0, else 0 (NaN too), with the clipped straight-through gradient.

    Gradient 1 where |x| <= clip_value, else 0. Values are {0, 1}, one bit but not signs, so layers
    compute on real numbers. Alias "ste_heaviside". Raises ValueError for a negative clip_value.
    """

    precision = 1
    clip_value: float | None

    def __init__(self, clip_value: float | None = 1.0) -> None:
        super().__init__(clip_value=_checked_clip("SteHeaviside", clip_value))

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, "heaviside", self.clip_value)


class SteTern(Quantizer):
    """-1, 0 or +1 (Ternary Weight Networks, Li et al. 2016) with the clipped straight-through rule.

    Forward 0 where |x| < t and at NaN, else the sign of x: at |x| = t the value is -1 or +1 (and 0
    at x = t = 0). t is threshold_value, or 0.7 mean |x| over the whole tensor (TWN, eq. 6) with
    ternary_weight_networks=True. Gradient 1 where |x| <= clip_value, else 0. Alias "ste_tern".
    Raises ValueError for a negative threshold_value or clip_value.
    """

    precision = 2
    threshold_value: float
    ternary_weight_networks: bool
    clip_value: float | None

    def __init__(self, threshold_value: float = 0.05, ternary_weight_networks: bool = False,
                 clip_value: float | None = 1.0) -> None:
        super().__init__(threshold_value=number("SteTern", "threshold_value", threshold_value, 0),
                         ternary_weight_networks=flag("SteTern", "ternary_weight_networks",
                                                      ternary_weight_networks),
                         clip_value=_checked_clip("SteTern", clip_value))

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        if self.ternary_weight_networks:
            threshold = 0.7 * x.detach().abs().mean()
        else:
            threshold = torch.full((), self.threshold_value, dtype=x.dtype, device=x.device)
        return straight_through(x, "ternary", self.clip_value, threshold)


class DoReFa(Quantizer):
    """k-bit quantizer of DoReFa-Net (Zhou et al. 2016), n = 2^k_bit - 1 steps.

    mode "activations": round(n clip(x, 0, 1)) / n (eq. 8 with the paper's bounded activation).
    mode "weights": 2 round(n (tanh(x) / (2 max |tanh(x)|) + 1/2)) / n - 1 (eq. 9).
    Rounding is half to even in float32 (float64 for float64), so a 2-bit weight of 0 becomes +1/3
    and a 1-bit one -1. Gradients: rounding passes them unchanged, clip and tanh have their own
    (clip's is 1 at 0 and 1), the maximum is a constant. Alias "dorefa_quantizer". Raises ValueError
    for k_bit out of 1 to 32 or another mode.
    """

    k_bit: int
    mode: str

    def __init__(self, k_bit: int = 2,
                 mode: Literal["activations", "weights"] = "activations") -> None:
        super().__init__(k_bit=integer("DoReFa", "k_bit", k_bit, 1, 32),
                         mode=choice("DoReFa", "mode", mode, ("activations", "weights")))

    @property
    def precision(self) -> int:  # type: ignore[override]
        return self.k_bit

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        n = float(2**self.k_bit - 1)
        if self.mode == "activations":
            return apply(Round, clamp(wide, 0, 1), n).to(x.dtype)
        if x.numel() == 0:  # has no maximum, but a gradient
            return x.clone()
        tanh = torch.tanh(wide)
        limit = tanh.detach().abs().max()
        limit = torch.where(limit == 0, torch.ones_like(limit), limit)
        return (2 * apply(Round, tanh / (2 * limit) + 0.5, n) - 1).to(x.dtype)


class NoOp(Quantizer):
    """The identity, for values that are quantized elsewhere (weights that Bop keeps at -1 and +1).

    `precision` is what the values are said to have: 1 promises -1 and +1, 32 leaves them real.
    Raises ValueError for a precision below 1.
    """

    precision: int

    def __init__(self, precision: int) -> None:
        super().__init__(precision=integer("NoOp", "precision", precision))

    @property
    def binary(self) -> bool:  # type: ignore[override]
        return self.precision == 1

    @traced_whole
    def forward(self, x: Tensor) -> Tensor:
        return x


def mean_magnitude(x: Tensor) -> Tensor:
    """mean |x| over all dimensions but the first, shaped to broadcast against x."""
    if x.dim() < 1:
        raise ValueError("a mean magnitude per output channel needs at least one dimension")
    # Not of x.flatten(1), which copies a channels-last weight: twice as long.
    return x.abs().mean(tuple(range(1, x.dim())), keepdim=True) if x.dim() > 1 else x.abs()


_ALIASES: dict[str, type[Quantizer]] = {
    "ste_sign": SteSign,
    "approx_sign": ApproxSign,
    "swish_sign": SwishSign,
    "magnitude_aware_sign": MagnitudeAwareSign,
    "ste_heaviside": SteHeaviside,
    "ste_tern": SteTern,
    "dorefa_quantizer": DoReFa,
}
_NAMES = _ALIASES | {cls.__name__: cls for cls in _ALIASES.values()}


def get(identifier: str | type[nn.Module] | Quantize | None) -> Quantize | None:
    """The quantizer an alias, class name, class or quantizer stands for; None stays None.

    Names and classes give a new quantizer with default arguments; a module or another callable is
    returned as it is. Raises ValueError for anything else.
    """
    if identifier is None:
        return None
    if isinstance(identifier, str) and identifier in _NAMES:
        return _NAMES[identifier]()
    if isinstance(identifier, type) and issubclass(identifier, nn.Module) and identifier != NoOp:
        return identifier()
    if callable(identifier) and not isinstance(identifier, type):
        return identifier
    raise ValueError(
        f"unknown quantizer {identifier!r}: give None, a callable, NoOp(precision) or one of "
        + ", ".join(f"{alias} ({cls.__name__})" for alias, cls in _ALIASES.items()))


def is_binary(quantizer: Quantize | None) -> bool:
    """Whether all values are -1 and +1: `binary` where there is one, else `precision == 1`.

    None stands for values that are -1 and +1 already.
    """
    if quantizer is None:
        return True
    return bool(getattr(quantizer, "binary", getattr(quantizer, "precision", None) == 1))
