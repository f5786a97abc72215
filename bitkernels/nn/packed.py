"""Inference twins of the binary layers: packed 1-bit weights, no latent ones, no gradients.

Buffers, all in the state_dict:
  weight_words  int32 signs, (Cout, kh, kw, ceil(Cin/groups/32)) or (out, ceil(in/32))
  scale, bias   float32 (Cout,), or None; `half()`, `to(dtype)` and the default dtype leave them so

On CPUs the words are read as `tile_weight` orders them. These tiles are kept outside the state and
follow weight_words, however they are loaded, replaced or written to (`bitkernels.packed`, which
also says which writes PyTorch itself does not count). Compiled and exported graphs hold the words
alone, so CPU kernels rearrange them in each call.

In place of a real input all take its `PackedTensor`, and pack nothing then.

The output has the input's dtype (under autocast, the autocast dtype) and is equal, bit for bit, to
that of the layer it was packed from where that computes in float32. An input that requires grad is
an error: there is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import _onnx
from bitkernels._arguments import flag, refuse
from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.nn import arguments
from bitkernels.nn.weight_facts import WeightFacts
from bitkernels.ops.geometry import wants_channels_last, word_count
from bitkernels.packed import PackedTensor, WeightImage

_sign_pack = torch.ops.bitkernels.sign_pack.default
_tile_weight = torch.ops.bitkernels.tile_weight.default
_packed_conv2d = torch.ops.bitkernels.packed_conv2d.default
_packed_linear = torch.ops.bitkernels.packed_linear.default
_unpack = torch.ops.bitkernels.unpack.default

_OWN = ("weight_words", "scale", "bias")
# Sizes and geometry, from which the words and what is derived from them were made.
_FIXED = frozenset(("in_channels", "out_channels", "in_features", "out_features", "kernel_size",
                    "stride", "padding", "output_padding", "dilation", "groups", "padding_mode"))


def _tiles(words: Tensor, groups: int) -> Tensor | None:
    return _tile_weight(words, groups) if words.is_cpu else None


class _Packed(FxLeaf):
    weight_words: Tensor
    scale: Tensor | None
    bias: Tensor | None
    groups = 1
    padding_mode = "zeros"
    _channels: int  # real input channels
    _weight_dtype = torch.float32  # of the latent weight, as `to` has changed it since
    _dims = 0  # of the image
    _pads: tuple[int, ...]
    _arguments: tuple[str, ...]  # of the constructor, that are attributes
    _image_of: Callable[..., Any] = staticmethod(_tiles)

    def _register(self, words_shape: tuple[int, ...], scale: bool, bias: bool, device,
                  input_quantizer) -> None:
        where = type(self).__name__
        flag(where, "bias", bias), flag(where, "scale", scale)
        if input_quantizer is not None and (not callable(input_quantizer)
                                            or isinstance(input_quantizer, type)):
            refuse(where, "input_quantizer", "None or a module", input_quantizer)

        def vector(wanted: bool, value: float) -> Tensor | None:
            if not wanted:
                return None
            return torch.full((words_shape[0],), value, dtype=torch.float32, device=device)

        words = torch.zeros(words_shape, dtype=torch.int32, device=device)
        self.register_buffer("weight_words", words)
        self.register_buffer("scale", vector(scale, 1.0))
        self.register_buffer("bias", vector(bias, 0.0))
        self.input_quantizer = input_quantizer
        self._weight_dtype = torch.get_default_dtype()
        self._image = WeightImage(self._image_of)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "weight_words" in self.__dict__.get("_buffers", ()):
            raise AttributeError(f"{type(self).__name__}: {name} is that of the layer that was "
                                 "packed; change it there and pack again")
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_tiles" in state:  # the older name
            self._image = self.__dict__.pop("_tiles")

    @classmethod
    @torch.no_grad()
    def from_layer(cls, layer: Any):
        """The twin of a binary layer that computes on bits, with its signs, scale and bias."""
        own = {name: getattr(layer, name) for name in cls._arguments}
        scale, bias, options = layer.scale(), layer.bias, layer.binarization
        twin: Any = cls(
            **own, bias=bias is not None, device=layer.weight.device, scale=scale is not None,
            input_quantizer=layer.input_quantizer if options.input_first else None)
        weight = layer.weight_to_sign()
        if weight.shape != twin._weight_shape():
            raise ValueError(f"{type(layer).__name__} cannot be packed: weight must be of shape "
                             f"{twin._weight_shape()} as its attributes say, got "
                             f"{tuple(weight.shape)}")
        weight = twin._by_output(weight)
        twin.weight_words = _sign_pack(weight, None, 1).view(twin.weight_words.shape)
        twin.scale = None if scale is None else scale.float()
        twin.bias = None if bias is None else bias.detach().float().clone()
        twin._weight_dtype = layer.weight.dtype
        return twin.train(layer.training)

    def _apply(self, fn, recurse=True):
        """Move the buffers as any module's, but keep their dtype and order: words are counted in
        rows, and scale and bias would be rounded."""
        before = {name: self._buffers[name] for name in _OWN}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None:
                continue
            if new.dtype != old.dtype:
                new = new.to(old.dtype) if old.is_meta else old.to(new.device)
            self._buffers[name] = new.contiguous()
        self._weight_dtype = fn(torch.empty(0, dtype=self._weight_dtype, device="cpu")).dtype
        self._image.clear()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs) -> None:
        key = f"{prefix}weight_words"
        wrong = self._not_words(state_dict.get(key))
        if wrong is not None:  # a copy would round to other words
            error_msgs.append(f"{key} of {type(self).__name__} must be the packed words of "
                              f"{self._channels // self.groups} channels in int32, {wrong}")
            return
        self._image.clear()  # torch.utils.swap_tensors takes no tensor with weak references
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys,
                                      unexpected_keys, error_msgs)
        for name in ("scale", "bias"):
            vector = self._buffers[name]
            if vector is not None and vector.dtype != torch.float32:  # by assign=True
                self._buffers[name] = vector.float()

    def _not_words(self, words: Any) -> str | None:
        """Why words that are to be loaded are none of this layer, other sizes aside."""
        if not isinstance(words, Tensor):
            return None
        if words.dtype != torch.int32:
            return f"got {str(words.dtype)[6:]}"
        used = self._channels // self.groups % 32
        if (used and words.numel() and type(words) is Tensor and not words.is_meta
                and bool((words[..., -1] >> used).any())):
            return f"got bits behind channel {self._channels // self.groups}"
        return None

    def binary_weight(self, scaled: bool = False) -> Tensor:
        """The weights -1 and +1, times alpha if scaled: float32, shaped as those of the layer that
        was packed, (Cout, Cin/groups, kh, kw) for a two-dimensional convolution.
        """
        signs = _unpack(self.weight_words, self._channels // self.groups, torch.float32, 1)
        signs = signs.squeeze(2) if signs.dim() - 2 > self._dims else signs
        if scaled and self.scale is not None:
            signs = signs * self.scale.view(-1, *[1] * (signs.dim() - 1))
        return self._by_output(signs).contiguous()

    def _by_output(self, weight: Tensor) -> Tensor:
        """A weight of the layer that was packed with the output channels first, and back."""
        return weight

    def arguments(self) -> dict[str, Any]:
        """The class and the constructor's arguments, of plain types, for a file's metadata."""
        quantizer = self.input_quantizer
        own = {name: getattr(self, name) for name in self._arguments}
        return dict(**{"class": type(self).__name__}, **own, bias=self.bias is not None,
                    scale=self.scale is not None,
                    input_quantizer=None if quantizer is None else type(quantizer).__qualname__)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return WeightFacts(type(self).__name__, self._weight_shape(), self._weight_dtype,
                               self.weight_words.device)
        return super().__getattr__(name)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.weight_words.shape[0], self._channels // self.groups,
                *getattr(self, "kernel_size", ()))

    def _check(self, input: Tensor | PackedTensor) -> None:
        """Refuse what this layer has no output for."""
        name, dims, shape = type(self).__name__, self._dims + 2, input.shape
        if isinstance(input, PackedTensor):
            if input.dim != 1 - dims:
                raise RuntimeError(f"{name}: input must have its channels in dimension {1 - dims}, "
                                   f"got a PackedTensor with dim={input.dim}")
            quantizer = self.input_quantizer
            reason = (f"input_quantizer {type(quantizer).__name__} takes values"
                      if quantizer is not None else
                      f"padding_mode={self.padding_mode!r} pads them"
                      if self.padding_mode != "zeros" else
                      "ONNX has no words" if _onnx.is_exporting() else None)
            if reason is not None:
                raise RuntimeError(f"{name}: input must be real numbers, for {reason}; got a "
                                   "PackedTensor, give its unpack()")
        elif input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: the input must not require grad, for a packed layer has no gradient: "
                "give it input.detach() or call it under torch.no_grad(); the model before pack() "
                "has gradients")
        if self._dims and (len(shape) not in (dims - 1, dims)
                           or shape[1 - dims] != self._channels):
            raise RuntimeError(
                f"{name}: input must be (N, {self._channels}, ...) with {dims} dimensions, or one "
                f"less without N, got shape {tuple(shape)}")
        if not self._dims and (not shape or shape[-1] != self._channels):
            raise RuntimeError(f"{name}: input must be (..., {self._channels}), got shape "
                               f"{tuple(shape)}")

    def _dtype(self, input: Tensor | PackedTensor) -> torch.dtype:
        """The output's: the input's, or autocast's, as of the layer this was packed from."""
        device = input.device.type
        if (device in ("cpu", "cuda") and input.dtype != torch.float64
                and torch.is_autocast_enabled(device)):
            return torch.get_autocast_dtype(device)
        return input.dtype

    def weight_image(self) -> Any:
        """The weight in the form that kernels of its device read without rearranging it, which is
        `weight_words` itself where there is no other."""
        words: Any = self._buffers["weight_words"]  # an attribute of a module costs half a us
        image = self._image(words, *self._image_key())
        return words if image is None else image

    def _image_key(self) -> tuple[Any, ...]:
        return (self.groups,)

    def _on_images(self, input: Tensor | PackedTensor, *arguments: Any) -> Tensor:
        """`_convolve` of an input of any form that the layer takes."""
        packed, flat = isinstance(input, PackedTensor), self._dims == 1
        # Quantized as it is given, before it is padded, as by the layer that was packed.
        x: Any = input.words if isinstance(input, PackedTensor) else self._quantized(input)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._pads, mode=self.padding_mode)
        batched = x.dim() == self._dims + 2
        x = x if batched else x.unsqueeze(0)
        x = x.unsqueeze(-3 if packed else -2) if flat else x
        out = self._convolve(x, packed, self._dtype(input), *arguments)
        out = out.squeeze(-2) if flat else out
        return out if batched else out.squeeze(0)

    def _convolve(self, x: Tensor, packed: bool, dtype: torch.dtype, *arguments: Any) -> Tensor:
        """Of words, (N, H, W, words), if packed, else of the quantized (N, C, H, W)."""
        raise NotImplementedError

    def _quantized(self, input: Tensor) -> Tensor:
        return input if self.input_quantizer is None else self.input_quantizer(input)


class _PackedConv(_Packed):
    _real: type[nn.Module]
    _arguments = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                  "groups", "padding_mode", "pad_value")

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0,
                 dilation=1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
                 device=None, *, pad_value: int = 0, scale: bool = False,
                 input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        where, dims = type(self).__name__, 1 if self._real is nn.Conv1d else 2
        # The real layer knows what fits together, and the padding by name.
        real: Any = self._real(*arguments.convolution(
            where, dims, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias, padding_mode, "meta"))
        pad_value = arguments.pad_value_of(where, pad_value, padding_mode)
        in_channels, out_channels, groups = real.in_channels, real.out_channels, real.groups
        self.in_channels, self.out_channels = in_channels, out_channels
        self._channels, self._dims = in_channels, dims
        self.kernel_size, self.stride, self.padding = real.kernel_size, real.stride, real.padding
        self.dilation, self.groups, self.pad_value = real.dilation, groups, pad_value
        self.padding_mode = padding_mode
        self._pads = tuple(real._reversed_padding_repeated_twice)  # last dimension first
        flat = len(self.kernel_size) == 1
        lift = (1,) if flat else ()
        pads = (0, 0, *self._pads) if flat else (*self._pads[2:], *self._pads[:2])
        self._geometry = ((*lift, *self.stride), pads if padding_mode == "zeros" else (0, 0),
                          (*lift, *self.dilation))
        self._register((out_channels, *lift, *self.kernel_size,
                        word_count(in_channels // groups)), scale, bias, device, input_quantizer)

    def pads_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """The padding in pixels, of an image of this height and width: top, bottom, left, right."""
        return self._geometry[1]

    @traced_whole
    def forward(self, input: Tensor | PackedTensor) -> Tensor:
        self._check(input)
        return self._on_images(input)

    def _convolve(self, x: Tensor, packed: bool, dtype: torch.dtype) -> Tensor:
        stride, _, dilation = self._geometry
        pads = self.pads_of(x.shape[1:3] if packed else x.shape[2:])
        if _onnx.is_exporting():
            return _onnx.packed_conv2d(
                x, self.weight_words, self.in_channels, stride, pads, dilation, self.groups,
                self.pad_value, self.scale, self.bias, dtype)
        own: Any = self._buffers
        return _packed_conv2d(
            x if packed else _sign_pack(x, None, 1), self.weight_image(),
            self.in_channels, stride, pads, dilation, self.groups, pad_value=self.pad_value,
            out_channels=self.out_channels, scale=own["scale"], bias=own["bias"], dtype=dtype,
            channels_last=packed or wants_channels_last(x, x))

    def extra_repr(self) -> str:
        text = (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}, "
                f"groups={self.groups}, bias={self.bias is not None}")
        for name, default in (("padding_mode", "zeros"), ("pad_value", 0)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text + f", scale={self.scale is not None}"


class PackedConv2d(_PackedConv):
    """A packed `BinaryConv2d`; made by its `pack()`, or empty to load a state_dict into.

    Input (N, Cin, H, W) or (Cin, H, W), real: its signs are packed, then convolved; or their
    `PackedTensor`. The arguments are those of `nn.Conv2d`; scale says whether there is a factor per
    output channel, and input_quantizer is a custom quantizer to -1 and +1 that runs first, and
    needs a real input.
    """

    _real = nn.Conv2d


class PackedConv1d(_PackedConv):
    """A packed `BinaryConv1d`, see `PackedConv2d`. Input (N, Cin, L) or (Cin, L)."""

    _real = nn.Conv1d


class PackedLinear(_Packed):
    """A packed `BinaryLinear`; made by its `pack()`, or empty to load a state_dict into.

    Input (..., in_features), real, or its `PackedTensor`; output (..., out_features). scale says
    whether there is a factor per output, input_quantizer is a custom quantizer to -1 and +1 that
    runs first, and needs a real input.
    """

    _arguments = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, *,
                 scale: bool = False, input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        in_features, out_features, *_ = arguments.linear(type(self).__name__, in_features,
                                                         out_features, bias)
        self.in_features, self.out_features = in_features, out_features
        self._channels = in_features
        self._register((out_features, word_count(in_features)), scale, bias, device,
                       input_quantizer)

    @traced_whole
    def forward(self, input: Tensor | PackedTensor) -> Tensor:
        self._check(input)
        if _onnx.is_exporting():
            real: Any = input  # by _check
            return _onnx.packed_linear(
                self._quantized(real), self.weight_words, self.in_features, self.scale, self.bias,
                self._dtype(input))
        own: Any = self._buffers
        words = (input.words if isinstance(input, PackedTensor) else
                 _sign_pack(self._quantized(input), None, -1))
        return _packed_linear(
            words, self.weight_image(), self.in_features, out_channels=self.out_features,
            scale=own["scale"], bias=own["bias"], dtype=self._dtype(input))

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, scale={self.scale is not None}")
