"""What all binary layers share: quantizers, weight scales and the choice between bits and reals."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitkernels import _onnx, quantizers
from bitkernels._dispatch import apply, with_gradient_of
from bitkernels._fx import FxLeaf
from bitkernels.quantizers import (
    ApproxSign,
    MagnitudeAwareSign,
    NoOp,
    Quantize,
    SteSign,
    SwishSign,
    is_binary,
)

QuantizerLike = str | type[nn.Module] | Quantize | None
WeightScale = Literal["detached", "magnitude_aware", "xnor"] | None

WEIGHT_SCALES = (None, "detached", "magnitude_aware", "xnor")
_OPERATOR_DEFAULTS = dict(input_estimator="ste_sign", input_clip=1.0, weight_estimator="ste_sign",
                          weight_clip=1.0, beta=5.0, scale_weight_grad=True)
_OPTIONS = ("input_quantizer", "weight_quantizer", "weight_scale")


def _operand(quantizer: Quantize | None) -> tuple[str, float | None, float | None, bool] | None:
    """(estimator, clip, beta, whether the quantizer runs before the operator), or None if real.

    A subclass of a sign quantizer may compute anything, so only the exact classes are replaced by
    the operator's own estimator.
    """
    if quantizer is None or (type(quantizer) is NoOp and quantizer.binary):
        return "identity", None, None, False
    if type(quantizer) in (SteSign, ApproxSign, SwishSign):
        return (quantizer.estimator, getattr(quantizer, "clip_value", None),  # type: ignore
                getattr(quantizer, "beta", None), False)
    return ("identity", None, None, True) if is_binary(quantizer) else None


class _ForwardScale(torch.autograd.Function):
    """signs * scale, with the gradient of `signs` alone."""

    operator = "weight_scale='detached'"
    generate_vmap_rule = True

    @staticmethod
    def forward(signs, scale):
        return signs * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def exported(signs, scale):
        return with_gradient_of(signs * scale, signs)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class BinaryLayer(FxLeaf):
    """Mixin of the binary layers; comes before the `torch.nn` layer it makes binary.

    The layer computes on bits if both quantizers return -1 and +1, else on real numbers: the plain
    PyTorch function on the quantized tensors. `on_bits` says which.

    Options, which may be assigned later too:

    input_quantizer, weight_quantizer: a name, class, module or callable (`bitkernels.quantizers`).
      ste_sign, approx_sign and swish_sign become estimators of the operator. None, or
      NoOp(precision=1), promises values that are -1 and +1 already: their sign is taken and
      gradients pass unchanged. Any other quantizer that has `precision = 1` (or `binary = True`)
      must return -1 and +1; it runs before the operator. A real input of a layer with binary
      weights is input_quantizer=NoOp(precision=32).
    weight_scale: the factor alpha = mean |w| of each output channel. With s = sign(w), m the
      estimator's derivative at w and G the gradient of the loss with respect to alpha s:
        None               no factor; the gradient of w is G m
        "detached"         G m: Bi-Real Net, ReActNet (Liu et al. 2018, 2020): alpha is a constant
                           and scales the forward pass only
        "magnitude_aware"  alpha G m: Larq's magnitude_aware_sign, alpha a constant in both passes
                           (weight_quantizer="magnitude_aware_sign" is ste_sign with this scale)
        "xnor"             alpha G m + d alpha/dw sum(G s): XNOR-Net (Rastegari et al. 2016) as
                           trained in Larq Zoo, alpha = mean |clip(w, -1, 1)| differentiated too

    Raises ValueError for an unknown quantizer or scale, and for a scale of weights that are not
    binary.
    """

    weight: Tensor
    input_quantizer: Quantize | None
    weight_quantizer: Quantize | None
    weight_scale: WeightScale
    on_bits: bool
    _unscaled_sign: SteSign | None
    _twin: Any = None  # class of the inference twin; without one a layer computes on reals

    def _configure(self, input_quantizer: QuantizerLike, weight_quantizer: QuantizerLike,
                   weight_scale: WeightScale) -> None:
        self.__dict__.pop("_train_args", None)  # not bound before all three are there
        self.input_quantizer = quantizers.get(input_quantizer)
        self.weight_quantizer = quantizers.get(weight_quantizer)
        self.weight_scale = weight_scale
        self._bind()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OPTIONS:
            super().__setattr__(name, value)
            return
        if name != "weight_scale":
            value = quantizers.get(value)
        had = {n: getattr(self, n) for n in (name,) if hasattr(self, n)}
        self._store(name, value)
        if "_train_args" in self.__dict__:
            try:
                self._bind()
            except ValueError:
                self._store(name, had[name])
                raise

    def _store(self, name: str, value: Any) -> None:
        for place in (self.__dict__, self._modules):
            place.pop(name, None)
        super().__setattr__(name, value)

    def _bind(self) -> None:
        """Decide once what each forward does, from the options."""
        scale, weight_quantizer = self.weight_scale, self.weight_quantizer
        if scale not in WEIGHT_SCALES:
            raise ValueError(f"{type(self).__name__}: weight_scale must be one of {WEIGHT_SCALES}, "
                             f"got {scale!r}")
        if type(weight_quantizer) is MagnitudeAwareSign:
            if scale not in (None, "magnitude_aware"):
                raise ValueError(f"{type(self).__name__}: weight_scale={scale!r} and "
                                 "weight_quantizer='magnitude_aware_sign' are two scales")
            scale, weight_quantizer = "magnitude_aware", SteSign(weight_quantizer.clip_value)
        if scale is not None and not is_binary(weight_quantizer):
            raise ValueError(f"{type(self).__name__}: weight_scale={scale!r} needs a weight "
                             f"quantizer that returns -1 and +1, got {weight_quantizer!r}")
        x, w = _operand(self.input_quantizer), _operand(weight_quantizer)
        if x and w and x[2] is not None and w[2] is not None and x[2] != w[2]:
            w = "identity", None, None, True  # the operator has one beta for both
        self.on_bits = x is not None and w is not None and self._twin is not None
        self._scale_rule = scale
        # Beside the submodules: the sign that replaces magnitude_aware_sign, whose scale is apart.
        replaced = weight_quantizer is not self.weight_quantizer
        self.__dict__["_unscaled_sign"] = weight_quantizer if replaced else None
        self._train_args: dict[str, Any] = {}
        if x is None or w is None or not self.on_bits:
            return
        self._input_first, self._weight_first = x[3], w[3]
        beta = w[2] if x[2] is None else x[2]
        arguments = dict(
            input_estimator=x[0], input_clip=x[1], weight_estimator=w[0], weight_clip=w[1],
            beta=5.0 if beta is None else beta, scale_weight_grad=scale != "detached")
        # Each argument passed costs the dispatcher time, so the operator's defaults are left out.
        self._train_args = {k: v for k, v in arguments.items() if v != _OPERATOR_DEFAULTS[k]}

    def scale(self) -> Tensor | None:
        """alpha of each output channel (Cout,), in float32 (float64 for float64); None without."""
        if self._scale_rule is None:
            return None
        w = self.weight if self._scale_rule == "xnor" else self.weight.detach()
        if self._scale_rule == "xnor":
            w = quantizers.clamp(w, -1, 1)
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        return w.abs().mean(tuple(range(1, w.dim())), dtype=dtype)

    def _bit_operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight for the operator, after the quantizers that it does not know."""
        if torch.jit.is_tracing():
            _onnx.is_exporting()  # raises for what takes operators of TorchScript only
        if self._input_first:
            input = _quantized(self.input_quantizer, input)
        return input, self.signs_of_weight()

    def signs_of_weight(self) -> Tensor:
        """A tensor shaped as the weight whose signs the layer computes with, on bits."""
        return self._quantized_weight() if self._weight_first else self.weight

    def _quantized_weight(self) -> Tensor:
        return _quantized(self._unscaled_sign or self.weight_quantizer, self.weight)

    def _real_operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized input, quantized and scaled weight."""
        weight = self._quantized_weight()
        scale = self.scale()
        if scale is not None:
            scale = scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
            weight = (apply(_ForwardScale, weight, scale) if self._scale_rule == "detached"
                      else weight * scale)
        return _quantized(self.input_quantizer, input), weight

    def pack_obstacle(self) -> str | None:
        """Why this layer has no packed twin, or None if it has one."""
        if self._twin is None:
            return "three-dimensional convolutions compute on real numbers"
        if not self.on_bits:
            return (f"input_quantizer={describe(self.input_quantizer)}, weight_quantizer="
                    f"{describe(self.weight_quantizer)} do not both return -1 and +1")
        return None

    def pack(self) -> nn.Module:
        """The inference twin with packed weights and equal outputs (`bitkernels.nn.packed`).

        Raises ValueError, with the reason, for a layer that has none (see `pack_obstacle`).
        """
        obstacle = self.pack_obstacle()
        if obstacle is not None:
            raise ValueError(f"{self!r} cannot be packed: {obstacle}")
        return self._twin.from_layer(self)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(),
                 f"input_quantizer={describe(self.input_quantizer)}",
                 f"weight_quantizer={describe(self.weight_quantizer)}"]
        if self.weight_scale is not None:
            parts.append(f"weight_scale={self.weight_scale!r}")
        if getattr(self, "pad_value", 0):
            parts.append(f"pad_value={self.pad_value}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _quantized(quantizer: Quantize | None, x: Tensor) -> Tensor:
    """The quantizer's values; where -1 and +1 are promised, the sign with gradient 1."""
    if quantizer is None or (type(quantizer) is NoOp and quantizer.binary):
        return SteSign(None)(x)
    return quantizer(x)


def describe(quantizer: Quantize | None) -> str:
    if quantizer is None or isinstance(quantizer, nn.Module):
        return repr(quantizer)
    return getattr(quantizer, "__name__", repr(quantizer))
