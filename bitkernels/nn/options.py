"""How a layer makes its input and its weight binary: two quantizers and a scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from bitkernels import quantizers
from bitkernels.quantizers import ApproxSign, MagnitudeAwareSign, NoOp, Quantize, SteSign, SwishSign

QuantizerLike = str | type[nn.Module] | Quantize | None
WeightScale = Literal["detached", "magnitude_aware", "xnor"] | None

WEIGHT_SCALES = (None, "detached", "magnitude_aware", "xnor")
OPERATOR_DEFAULTS = dict(input_estimator="ste_sign", input_clip=1.0, weight_estimator="ste_sign",
                         weight_clip=1.0, beta=5.0, scale_weight_grad=True)


class _Sign(NamedTuple):
    """A quantizer to -1 and +1 as an estimator of the operator; first: it runs before that."""

    estimator: str = "identity"
    clip: float | None = None
    beta: float | None = None
    first: bool = False


def _promises_signs(quantizer: Quantize | None) -> bool:
    """Whether it is no quantizer but the promise of values that are -1 and +1 already."""
    return quantizer is None or (type(quantizer) is NoOp and quantizer.binary)


def _sign(quantizer: Quantize | None) -> _Sign | None:
    """None if it does not return -1 and +1.

    A subclass of a sign quantizer may compute anything, so only the exact classes are replaced by
    the operator's own estimator.
    """
    if _promises_signs(quantizer):
        return _Sign()
    if type(quantizer) in (SteSign, ApproxSign, SwishSign):
        known: Any = quantizer
        return _Sign(known.estimator, getattr(known, "clip_value", None),
                     getattr(known, "beta", None))
    return _Sign(first=True) if quantizers.is_binary(quantizer) else None


@dataclass(frozen=True, eq=False)
class Binarization:
    """The options of a binary layer (`BinaryLayer` says what they mean), and what follows from
    them, decided once. A layer's is swapped whole: `layer.binarization = Binarization(...)`.

    input_quantizer, weight_quantizer: a name, class, module or callable; read, what
      `bitkernels.quantizers.get` makes of it.

    Derived:
    input_is_sign, weight_is_sign: whether the quantizer returns -1 and +1, the scale aside.
    input_first, weight_first: whether it has to run before the operator, which does not know it.
    unscaled_sign: what runs in place of a weight quantizer whose scale is apart.
    scale_rule: weight_scale, or that of the weight quantizer.
    estimators: the operator's keyword arguments for both signs; its defaults are left out, since
      each argument costs the dispatcher time. Empty unless both are signs.

    Raises ValueError for an unknown quantizer or scale, and for a scale of weights that are not
    binary.
    """

    input_quantizer: Any
    weight_quantizer: Any
    weight_scale: WeightScale = None
    input_is_sign: bool = field(init=False)
    weight_is_sign: bool = field(init=False)
    input_first: bool = field(init=False)
    weight_first: bool = field(init=False)
    unscaled_sign: SteSign | None = field(init=False, default=None)
    scale_rule: WeightScale = field(init=False)
    estimators: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        own: dict[str, Any] = {}
        for name in ("input_quantizer", "weight_quantizer"):
            try:
                own[name] = quantizers.get(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        weight_sign, scale = own["weight_quantizer"], self.weight_scale
        if scale not in WEIGHT_SCALES:
            raise ValueError(f"weight_scale must be one of {WEIGHT_SCALES}, got {scale!r}")
        if type(weight_sign) is MagnitudeAwareSign:
            if scale not in (None, "magnitude_aware"):
                raise ValueError(f"weight_scale={scale!r} and "
                                 "weight_quantizer='magnitude_aware_sign' are two scales")
            scale, weight_sign = "magnitude_aware", SteSign(weight_sign.clip_value)
        if scale is not None and not quantizers.is_binary(weight_sign):
            raise ValueError(f"weight_scale={scale!r} needs a weight quantizer that returns -1 and "
                             f"+1, got {weight_sign!r}")
        if weight_sign is not own["weight_quantizer"]:
            own["unscaled_sign"] = weight_sign
        x, w = _sign(own["input_quantizer"]), _sign(weight_sign)
        estimators: dict[str, Any] = {}
        if x and w:
            if x.beta is not None and w.beta is not None and x.beta != w.beta:
                w = _Sign(first=True)  # the operator has one beta for both
            beta = w.beta if x.beta is None else x.beta
            estimators = dict(
                input_estimator=x.estimator, input_clip=x.clip, weight_estimator=w.estimator,
                weight_clip=w.clip, beta=5.0 if beta is None else beta,
                scale_weight_grad=scale != "detached")
        own |= dict(input_is_sign=x is not None, weight_is_sign=w is not None, scale_rule=scale,
                    input_first=x is not None and x.first, weight_first=w is not None and w.first,
                    estimators={name: value for name, value in estimators.items()
                                if value != OPERATOR_DEFAULTS[name]})
        self.__dict__.update(own)  # as a frozen class sets its own fields


def quantized(quantizer: Quantize | None, x: Tensor) -> Tensor:
    """The quantizer's values; where -1 and +1 are promised, the sign with gradient 1."""
    if quantizer is None or _promises_signs(quantizer):
        return SteSign(None)(x)
    return quantizer(x)


def describe(quantizer: Quantize | None) -> str:
    if quantizer is None or isinstance(quantizer, nn.Module):
        return repr(quantizer)
    return getattr(quantizer, "__name__", repr(quantizer))
