"""What all binary layers share: quantizers, weight scales and the choice between bits and reals."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels import _onnx, quantizers
from bitkernels._dispatch import apply, with_gradient_of
from bitkernels._fx import FxLeaf
from bitkernels.nn import hooks, latent
from bitkernels.nn.arguments import geometry
from bitkernels.nn.looking import Looked, can_look_at, single_sign
from bitkernels.nn.options import (
    Binarization,
    QuantizerLike,
    WeightScale,
    describe,
    quantized,
)
from bitkernels.quantizers import MagnitudeAwareSign, Quantize

__all__ = ["BinaryLayer", "QuantizerLike", "WeightScale", "channel_scale"]

_QUANTIZERS = ("input_quantizer", "weight_quantizer")
_OPTIONS = (*_QUANTIZERS, "weight_scale")
_GEOMETRY = ("stride", "padding", "dilation", "output_padding")
# What an inference twin does in place of the layer, and hence no subclass or instance may replace.
_COMPUTES = ("forward", "_conv_forward", "__call__", "_call_impl", "_bit_operands", "_real_forward",
             "_real_operands", "operator_arguments")


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


def _option(name: str) -> Any:
    """A quantizer or the scale, read; `BinaryLayer.__setattr__` assigns it."""
    def read(layer: BinaryLayer) -> Any:
        own = layer._modules  # where tools put another module in place of a submodule
        return own[name] if name in own else getattr(layer.binarization, name)

    return property(read)


class BinaryLayer(FxLeaf):
    """Mixin of the binary layers; comes before the `torch.nn` layer it makes binary.

    The layer computes on bits if both quantizers return -1 and +1, else on real numbers: the plain
    PyTorch function on the quantized tensors. `on_bits` says which.

    Options, which may be assigned later too, or all at once as `layer.binarization`:

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
    writes such factors in place, or into a layer of one product an output, is not noticed, and
    wrong. Keep the norm: a `BinaryResidualBlock` evaluates it in the convolution's epilogue.

    A weight that is 0, by `torch.nn.utils.prune` or otherwise, counts as +1: a bit cannot be 0. The
    first forward with many such weights warns.

    A UserWarning says so where all signs of a layer's first training input are the same, as behind
    a ReLU: its output then does not depend on the input.

    Raises ValueError for an unknown quantizer or scale, and for a scale of weights that are not
    binary.
    """

    weight: Tensor
    binarization: Binarization
    kernel_size: Any  # of convolutions
    input_quantizer: Quantize | None = _option("input_quantizer")
    weight_quantizer: Quantize | None = _option("weight_quantizer")
    weight_scale: WeightScale = _option("weight_scale")
    pad_value = 0  # of the operators that have one
    _twin: Any = None  # class of the inference twin; without one a layer computes on reals
    _looked: Looked  # from the first binarization on
    __jit_unused_properties__ = (*_OPTIONS, "on_bits")

    def _configure(self, input_quantizer: QuantizerLike, weight_quantizer: QuantizerLike,
                   weight_scale: WeightScale) -> None:
        try:
            self.binarization = Binarization(input_quantizer, weight_quantizer, weight_scale)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

    @property
    def on_bits(self) -> bool:
        binarization = self.binarization
        return (binarization.input_is_sign and binarization.weight_is_sign
                and self._twin is not None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS:
            self._configure(**{o: getattr(self, o) for o in _OPTIONS} | {name: value})
            return
        if name == "weight":
            self._check_weight(value)
        elif name in _GEOMETRY:
            value = geometry(type(self).__name__, name, value, len(self.kernel_size))
        elif name == "binarization":
            self._register_quantizers(value)
        super().__setattr__(name, value)

    def _register_quantizers(self, new: Binarization) -> None:
        """Quantizers that are modules are submodules too: what they learn is the layer's."""
        if not isinstance(new, Binarization):
            raise TypeError(f"{type(self).__name__}: binarization must be a Binarization, got "
                            f"{new!r}")
        for name in _QUANTIZERS:
            quantizer = getattr(new, name)
            if isinstance(quantizer, nn.Module):  # in its place: tools assign while they iterate
                super().__setattr__(name, quantizer)
            else:
                self._modules.pop(name, None)
        if "_looked" not in self.__dict__:
            self._looked = Looked()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "binarization" not in state:  # pickled before there was one
            options: Any = {name: self._modules.get(name, state.get(name)) for name in _OPTIONS}
            for name in (*_OPTIONS, "on_bits", "_scale_rule", "_unscaled_sign", "_train_args",
                         "_input_first", "_weight_first", "_unseen_weight", "_seen_mask",
                         "_input_seen"):
                self.__dict__.pop(name, None)
            self._configure(**options)

    def _check_weight(self, value: Any) -> None:
        """Refuse a weight that others have quantized, and a batch norm that is folded into the
        latent weight; look at new weights' zeros."""
        if type(value).__module__.startswith("torchao."):
            raise ValueError(
                f"{type(self).__name__}: weight must be real, got {type(value).__name__} of "
                "torchao, in which small weights are 0 and have lost their sign; pack(model) "
                "first, or give quantize_ a filter_fn that leaves out bitkernels.nn.BinaryLayer")
        old = self._parameters.get("weight")
        if (old is not None and isinstance(value, nn.Parameter) and not self.training
                and "_loading" not in self.__dict__ and latent.folded_factor(old, value)):
            raise ValueError(
                f"{type(self).__name__}: the new weight is the old one times a factor for each "
                "channel, as fuse_conv_bn_eval makes it. Signs drop the factors, so a batch norm "
                "cannot be folded into a latent weight; keep the norm as it is (pack() does), or "
                "write the weight in place if only its size is to change")
        if "_looked" in self.__dict__ and "_is_replica" not in self.__dict__:
            self._looked.assign(value, self._buffers.get("weight_mask"))

    def _load_from_state_dict(self, *args: Any) -> None:
        self._looked.weight = False
        self.__dict__["_loading"] = True  # with assign=True weights of any size
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self.__dict__["_loading"]

    def operator_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the layer's operator that are not its defaults: estimators of
        the two signs, the scale of the weight as it is now, `pad_value`."""
        arguments = dict(self.binarization.estimators)
        if self.binarization.scale_rule is not None:
            arguments["scale"] = self.scale()
        if self.pad_value:
            arguments["pad_value"] = self.pad_value
        return arguments

    def scale(self) -> Tensor | None:
        """alpha of each output channel (Cout,), in float32 (float64 for float64); None without."""
        rule = self.binarization.scale_rule
        return None if rule is None else channel_scale(self._by_output(self.weight), rule)

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
        if self.binarization.input_first:
            input = quantized(self.input_quantizer, input)
        self.look_at_input(input)
        return input, self.weight_to_sign()

    def weight_to_sign(self) -> Tensor:
        """A tensor shaped as the weight, with its gradient, whose signs the layer computes with."""
        if self.binarization.weight_first:
            return self._quantized_weight()
        self._look_at_weight()
        return self.weight

    def look_at_input(self, input: Tensor, sign: Callable[[Tensor], Tensor] | None = None) -> None:
        """Warn where all signs of the layer's first training input are the same.

        sign: what they are taken by, where a module before the layer does that.
        """
        # In this order: the compiler must not make a graph for each state of the flag.
        if (not self.training or torch.compiler.is_compiling() or self._looked.input
                or not can_look_at(input) or "_is_replica" in self.__dict__):
            return
        self._looked.input = True
        with torch.no_grad():
            found = single_sign(input if sign is None else sign(input))
        if found is not None:
            warnings.warn(
                f"{type(self).__name__}({super().extra_repr()}): every sign of its first "
                f"training input is {found}, so its output does not depend on the input. A ReLU "
                "before it gives no negative value: use bitkernels.nn.RPReLU, nn.PReLU or "
                "nn.Hardtanh in its place, or put a batch norm between them", stacklevel=6)

    def _look_at_weight(self) -> None:
        """Once for each new weight: a warning if many are 0, which bits cannot say."""
        if torch.compiler.is_compiling() or self._looked.weight:
            return
        weight = self.weight
        if can_look_at(weight) and "_is_replica" not in self.__dict__:
            self._looked.weight = True
            text = latent.zeros_warning(weight.detach(), type(self).__name__)
            if text is not None:
                warnings.warn(text, stacklevel=4)

    def binary_weight(self, scaled: bool = False) -> Tensor:
        """The weights that the layer computes with: -1 and +1, times alpha if scaled.

        Shape and dtype of `weight`, detached; of the weight as it is now, pruned or parametrized.
        Raises ValueError where the weight quantizer does not return -1 and +1.
        """
        quantizer, binarization = self.weight_quantizer, self.binarization
        if not (binarization.weight_is_sign or isinstance(quantizer, MagnitudeAwareSign)):
            raise ValueError(f"{self!r} has no binary weight: weight_quantizer="
                             f"{describe(quantizer)} does not return -1 and +1")
        with torch.no_grad(), latent.weight_of_now(self):
            signs = self._quantized_weight() if binarization.weight_first else self.weight
            signs = torch.where(signs.detach() < 0, -1, 1).to(self.weight.dtype)
            scale = self.scale() if scaled else None
            return signs if scale is None else signs * self._factor(scale).to(signs.dtype)

    def signs_of_weight(self) -> Tensor:
        """`binary_weight()`: -1 and +1."""
        return self.binary_weight()

    def _quantized_weight(self) -> Tensor:
        sign = self.binarization.unscaled_sign
        return quantized(self.weight_quantizer if sign is None else sign, self.weight)

    def _real_operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized input, quantized and scaled weight."""
        weight = self._quantized_weight()
        if self.binarization.weight_is_sign:
            self._look_at_weight()
        scale = self.scale()
        if scale is not None:
            scale = self._factor(scale.to(weight.dtype))
            weight = (apply(_ForwardScale, weight, scale)
                      if self.binarization.scale_rule == "detached" else weight * scale)
        input = quantized(self.input_quantizer, input)
        if self.binarization.input_is_sign:
            self.look_at_input(input)
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
        twin = self.packed_twin(type(self).__name__, memo)
        hooks.carry_forward_hooks(self, twin, memo)
        return twin

    def packed_twin(self, name: str, memo: dict[int, Any]) -> nn.Module:
        """The twin without hooks, with warnings of what it cannot take over from layer `name`.

        In a deep copy with this memo it takes the layer's place.
        """
        with torch.inference_mode(False), latent.weight_of_now(self):
            twin = memo[id(self)] = self._twin.from_layer(self)
            twin.input_quantizer = copy.deepcopy(twin.input_quantizer, memo)
            doubts = ([] if self.binarization.weight_first else
                      [latent.zeros_warning(self.weight, name)])
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
        if self.pad_value:
            parts.append(f"pad_value={self.pad_value}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
