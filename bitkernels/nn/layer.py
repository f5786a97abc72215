"""What all binary layers share: quantizers, weight scales and the choice between bits and reals."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitkernels import _onnx, quantizers
from bitkernels._dispatch import apply, with_gradient_of
from bitkernels._fx import FxLeaf
from bitkernels.nn import hooks, latent
from bitkernels.nn.looking import can_look_at, single_sign
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
# What an inference twin does in place of the layer, and hence no subclass or instance may replace.
_COMPUTES = ("forward", "_conv_forward", "__call__", "_call_impl", "_bit_operands", "_real_forward",
             "_real_operands")


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


def channel_scale(weight: Tensor, rule: WeightScale) -> Tensor | None:
    """The factor of each output channel, which is the weight's dimension 0, by `BinaryLayer`'s
    rule for weight_scale; it has a gradient with "xnor" only."""
    if rule is None:
        return None
    weight = quantizers.clamp(weight, -1, 1) if rule == "xnor" else weight.detach()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.abs().mean(tuple(range(1, weight.dim())), dtype=dtype)


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

    A batch norm behind the layer cannot be folded into the latent weight, whose size the signs
    drop: `torch.nn.utils.fuse_conv_bn_eval` and `fuse_linear_bn_eval` raise here, since assigning
    (in evaluation) a weight that is the old one times a factor for each channel does. Code that
    writes such factors in place is not noticed, and wrong. Keep the norm: a `BinaryResidualBlock`
    evaluates it in the convolution's epilogue.

    A weight that is 0, by `torch.nn.utils.prune` or otherwise, counts as +1: a bit cannot be 0. The
    first forward with many such weights warns.

    A UserWarning says so where all signs of a layer's first training input are the same, as behind
    a ReLU: its output then does not depend on the input.

    Raises ValueError for an unknown quantizer or scale, and for a scale of weights that are not
    binary.
    """

    weight: Tensor
    input_quantizer: Quantize | None
    weight_quantizer: Quantize | None
    weight_scale: WeightScale
    on_bits: bool
    _unscaled_sign: SteSign | None
    _input_seen = False  # whether a training input was looked at
    _twin: Any = None  # class of the inference twin; without one a layer computes on reals

    def _configure(self, input_quantizer: QuantizerLike, weight_quantizer: QuantizerLike,
                   weight_scale: WeightScale) -> None:
        self.__dict__.pop("_train_args", None)  # not bound before all three are there
        self.input_quantizer = quantizers.get(input_quantizer)
        self.weight_quantizer = quantizers.get(weight_quantizer)
        self.weight_scale = weight_scale
        self.__dict__["_unseen_weight"] = True
        self._bind()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OPTIONS:
            if name == "weight":
                self._check_weight(value)
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

    def _check_weight(self, value: Any) -> None:
        """Refuse a batch norm that is folded into the latent weight; look at new weights' zeros."""
        old = self._parameters.get("weight")
        if (old is not None and isinstance(value, nn.Parameter) and not self.training
                and latent.folded_factor(old, value)):
            raise ValueError(
                f"{type(self).__name__}: the new weight is the old one times a factor for each "
                "channel, as fuse_conv_bn_eval makes it. Signs drop the factors, so a batch norm "
                "cannot be folded into a latent weight; keep the norm as it is (pack() does), or "
                "write the weight in place if only its size is to change")
        mask = self._buffers.get("weight_mask")
        seen = None if mask is None else id(mask)  # pruning hooks set the weight at every call
        if isinstance(value, nn.Parameter) or seen != self.__dict__.get("_seen_mask"):
            self.__dict__.update(_seen_mask=seen, _unseen_weight=True)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["_unseen_weight"] = True
        super()._load_from_state_dict(*args)

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
        return channel_scale(self._by_output(self.weight), self._scale_rule)

    def _by_output(self, weight: Tensor) -> Tensor:
        """The weight, or a tensor of its shape, with the output channels in dimension 0."""
        return weight

    def _factor(self, scale: Tensor) -> Tensor:
        """A scale of each output channel, shaped to multiply the weight."""
        return scale.view(-1, *[1] * (self.weight.dim() - 1))

    def _bit_operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight for the operator, after the quantizers that it does not know."""
        if torch.jit.is_tracing():
            _onnx.is_exporting()  # raises for what takes operators of TorchScript only
        if self._input_first:
            input = _quantized(self.input_quantizer, input)
        if not torch.compiler.is_compiling() and self.training and not self._input_seen:
            self._look_at(input)
        return input, self._weight_to_sign()

    def _weight_to_sign(self) -> Tensor:
        """A tensor shaped as the weight whose signs the layer computes with, on bits."""
        if self._weight_first:
            return self._quantized_weight()
        weight = self.weight
        # In this order: the compiler must not make a graph for each state of the flag.
        if not torch.compiler.is_compiling() and "_unseen_weight" in self.__dict__:
            self._look_at_weight(weight)
        return weight

    def _look_at_weight(self, weight: Tensor) -> None:
        """Once for each new weight: a warning if many are 0, which bits cannot say."""
        if can_look_at(weight) and "_is_replica" not in self.__dict__ and self.__dict__.pop(
                "_unseen_weight", None):
            latent.warn_of_zeros(self, weight)

    def binary_weight(self, scaled: bool = False) -> Tensor:
        """The weights that the layer computes with: -1 and +1, times alpha if scaled.

        Shape and dtype of `weight`, detached; of the weight as it is now, pruned or parametrized.
        Raises ValueError where the weight quantizer does not return -1 and +1.
        """
        quantizer = self.weight_quantizer
        if not (_operand(quantizer) or isinstance(quantizer, MagnitudeAwareSign)):
            raise ValueError(f"{self!r} has no binary weight: weight_quantizer="
                             f"{describe(quantizer)} does not return -1 and +1")
        with torch.no_grad(), latent.weight_of_now(self):
            signs = self._quantized_weight() if self._takes_values() else self.weight
            signs = torch.where(signs.detach() < 0, -1, 1).to(self.weight.dtype)
            scale = self.scale() if scaled else None
            return signs if scale is None else signs * self._factor(scale).to(signs.dtype)

    def _look_at(self, input: Tensor) -> None:
        """Warn, once for a layer, where all signs of its input are the same."""
        if not can_look_at(input) or "_is_replica" in self.__dict__:
            return
        self.__dict__["_input_seen"] = True
        sign = single_sign(input)
        if sign is not None:
            warnings.warn(
                f"{type(self).__name__}({super().extra_repr()}): every sign of its first "
                f"training input is {sign}, so its output does not depend on the input. A ReLU "
                "before it gives no negative value: use bitkernels.nn.RPReLU, nn.PReLU or "
                "nn.Hardtanh in its place, or put a batch norm between them", stacklevel=6)

    def signs_of_weight(self) -> Tensor:
        """`binary_weight()`: -1 and +1."""
        return self.binary_weight()

    def _of_signs(self) -> bool:
        """Whether both quantizers return -1 and +1."""
        return bool(_operand(self.input_quantizer)
                    and _operand(self._unscaled_sign or self.weight_quantizer))

    def _takes_values(self) -> bool:
        """Whether the signs are those of the weight quantizer's values and not of the weight."""
        operand = _operand(self._unscaled_sign or self.weight_quantizer)
        return operand is not None and operand[3]

    def _quantized_weight(self) -> Tensor:
        return _quantized(self._unscaled_sign or self.weight_quantizer, self.weight)

    def _real_operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized input, quantized and scaled weight."""
        weight = self._quantized_weight()
        if (not torch.compiler.is_compiling() and "_unseen_weight" in self.__dict__
                and _operand(self._unscaled_sign or self.weight_quantizer)):
            self._look_at_weight(self.weight)
        scale = self.scale()
        if scale is not None:
            scale = self._factor(scale.to(weight.dtype))
            weight = (apply(_ForwardScale, weight, scale) if self._scale_rule == "detached"
                      else weight * scale)
        input = _quantized(self.input_quantizer, input)
        if (not torch.compiler.is_compiling() and self.training and not self._input_seen
                and is_binary(self.input_quantizer)):
            self._look_at(input)
        return input, weight

    def pack_obstacle(self) -> str | None:
        """Why this layer has no packed twin, or None if it has one."""
        if self._twin is None:
            return "three-dimensional convolutions compute on real numbers"
        if not self.on_bits:
            return (f"input_quantizer={describe(self.input_quantizer)}, weight_quantizer="
                    f"{describe(self.weight_quantizer)} do not both return -1 and +1")
        own: Any = next(c for c in type(self).__mro__ if "_twin" in vars(c))
        for name in _COMPUTES:
            if getattr(type(self), name, None) is not getattr(own, name, None):
                return f"its class {type(self).__name__} has a {name} of its own"
        patched = hooks.replaced(self, _COMPUTES)
        if patched is not None:
            return (f"its {patched} is replaced on the instance (accelerate's "
                    "remove_hook_from_module takes such a one off)")
        if any(latent.is_sharded(t) for t in self._parameters.values()):
            return ("its weight is sharded (a DTensor); pack an unsharded model that has loaded "
                    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))")
        return None

    def pack(self) -> nn.Module:
        """The inference twin with packed weights and equal outputs (`bitkernels.nn.packed`).

        The weight is that of now: pruned, normed or parametrized as the next call of the layer in
        evaluation would have it. Forward hooks go with the layer.

        Raises ValueError, with the reason, for a layer that has none (see `pack_obstacle`).
        """
        obstacle = self.pack_obstacle()
        if obstacle is not None:
            raise ValueError(f"{self!r} cannot be packed: {obstacle}")
        memo: dict[int, Any] = {}
        twin = self._packed(type(self).__name__, memo)
        hooks.carry_forward_hooks(self, twin, memo)
        return twin

    def _packed(self, name: str, memo: dict[int, Any]) -> nn.Module:
        """The twin without hooks, with warnings of what it cannot take over from layer `name`.

        In a deep copy with this memo it takes the layer's place.
        """
        with torch.inference_mode(False), latent.weight_of_now(self):
            twin = memo[id(self)] = self._twin.from_layer(self)
            twin.input_quantizer = copy.deepcopy(twin.input_quantizer, memo)
            doubts = [] if self._weight_first else [latent.zeros_warning(self.weight, name)]
        if left := hooks.left_hooks(self):
            doubts.append(f"{name}: pack() leaves out its {' and '.join(left)}, which have no "
                          "meaning on packed weights without a gradient")
        for doubt in filter(None, doubts):
            warnings.warn(doubt, stacklevel=3)
        return twin

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
