"""Inference twins of the binary layers: packed 1-bit weights, no latent ones, no gradients.

Buffers, all in the state_dict:
  weight_words  int32 signs, (Cout, kh, kw, ceil(Cin/groups/32)) or (out, ceil(in/32))
  scale, bias   float32 (Cout,), or None; `half()`, `to(dtype)` and the default dtype leave them so

On CPUs the words are read as `tile_weight` orders them. These tiles are kept outside the state and
follow weight_words, however they are loaded, replaced or written to (`bitkernels.nn.derived`, which
also says which writes PyTorch itself does not count). Compiled and exported graphs hold the words
alone, so CPU kernels rearrange them in each call.

The output has the input's dtype (under autocast, the autocast dtype) and is equal, bit for bit, to
that of the layer it was packed from where that computes in float32. An input that requires grad is
an error: there is no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import _onnx
from bitkernels._checks import wants_channels_last, word_count
from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.nn.derived import Derived

_sign_pack = torch.ops.bitkernels.sign_pack.default
_tile_weight = torch.ops.bitkernels.tile_weight.default
_packed_conv2d = torch.ops.bitkernels.packed_conv2d.default
_packed_linear = torch.ops.bitkernels.packed_linear.default
_unpack = torch.ops.bitkernels.unpack.default

_OWN = ("weight_words", "scale", "bias")


def _tiles(words: Tensor, groups: int) -> Tensor:
    return _tile_weight(words, groups)


class _Packed(FxLeaf):
    weight_words: Tensor
    scale: Tensor | None
    bias: Tensor | None
    groups = 1
    _channels: int  # real input channels
    _dims = 0  # of the image
    _arguments: tuple[str, ...]  # of the constructor, that are attributes

    def _register(self, words_shape: tuple[int, ...], scale: bool, bias: bool, device,
                  input_quantizer) -> None:
        def vector(wanted: bool, value: float) -> Tensor | None:
            if not wanted:
                return None
            return torch.full((words_shape[0],), value, dtype=torch.float32, device=device)

        words = torch.zeros(words_shape, dtype=torch.int32, device=device)
        self.register_buffer("weight_words", words)
        self.register_buffer("scale", vector(scale, 1.0))
        self.register_buffer("bias", vector(bias, 0.0))
        self.input_quantizer = input_quantizer
        self._tiles = Derived(_tiles)

    @torch.no_grad()
    def _fill(self, layer: Any) -> None:
        """Take over signs, scale and bias of a binary layer."""
        weight = layer._by_output(layer._weight_to_sign())
        self.weight_words = _sign_pack(weight, None, 1).view(self.weight_words.shape)
        scale, bias = layer.scale(), layer.bias
        self.scale = None if scale is None else scale.float()
        self.bias = None if bias is None else bias.detach().float().clone()
        self.train(layer.training)

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
        self._tiles.clear()
        return self

    def _load_from_state_dict(self, *args) -> None:
        self._tiles.clear()  # torch.utils.swap_tensors takes no tensor with weak references
        super()._load_from_state_dict(*args)
        for name in ("scale", "bias"):
            vector = self._buffers[name]
            if vector is not None and vector.dtype != torch.float32:  # by assign=True
                self._buffers[name] = vector.float()

    def binary_weight(self, scaled: bool = False) -> Tensor:
        """The weights -1 and +1, times alpha if scaled: float32, shaped as those of the layer that
        was packed, (Cout, Cin/groups, kh, kw) for a two-dimensional convolution.
        """
        signs = _unpack(self.weight_words, self._channels // self.groups, torch.float32, 1)
        signs = signs.squeeze(2) if signs.dim() - 2 > self._dims else signs
        if scaled and self.scale is not None:
            signs = signs * self.scale.view(-1, *[1] * (signs.dim() - 1))
        return self._from_output(signs).contiguous()

    def _from_output(self, weight: Tensor) -> Tensor:
        """A weight with the output channels first, in the order of the layer that was packed."""
        return weight

    def arguments(self) -> dict[str, Any]:
        """The class and the constructor's arguments, of plain types, for a file's metadata."""
        quantizer = self.input_quantizer
        own = {name: getattr(self, name) for name in self._arguments}
        return dict(**{"class": type(self).__name__}, **own, bias=self.bias is not None,
                    scale=self.scale is not None,
                    input_quantizer=None if quantizer is None else type(quantizer).__qualname__)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # parents that compute with it themselves
            raise AttributeError(
                f"{type(self).__name__} has no real weight: call the layer, or read its "
                "binary_weight() (-1 and +1) or weight_words (packed)")
        return super().__getattr__(name)

    def _refuse_grad(self, input: Tensor) -> None:
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: the input must not require grad, for a packed layer has "
                "no gradient: give it input.detach() or call it under torch.no_grad(); the model "
                "before pack() has gradients")

    def _dtype(self, input: Tensor) -> torch.dtype:
        """The output's: the input's, or autocast's, as of the layer this was packed from."""
        device = input.device.type
        if (device in ("cpu", "cuda") and input.dtype != torch.float64
                and torch.is_autocast_enabled(device)):
            return torch.get_autocast_dtype(device)
        return input.dtype

    def _filter(self, input: Tensor) -> Tensor:
        """The layout that the input's backend reads without rearranging it."""
        words: Any = self._buffers["weight_words"]
        if not input.is_cpu:
            return words
        tiles = self._tiles(words, self.groups)
        return words if tiles is None else tiles

    def _words(self, input: Tensor, dim: int) -> Tensor:
        return _sign_pack(self._quantized(input), None, dim)

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
        # The real layer checks the arguments and brings them to its normal form.
        real: Any = self._real(in_channels, out_channels, kernel_size, stride, padding, dilation,
                               groups, bias, padding_mode, device="meta")
        if pad_value not in (-1, 0, 1):
            raise ValueError(
                f"{type(self).__name__}: pad_value must be -1, 0 or 1, got {pad_value!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self._channels, self._dims = in_channels, len(real.kernel_size)
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

    @classmethod
    def from_layer(cls, layer: Any):
        """The twin of a binary convolution that computes on bits."""
        twin = cls(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                   layer.padding, layer.dilation, layer.groups, layer.bias is not None,
                   layer.padding_mode, layer.weight.device, pad_value=layer.pad_value,
                   scale=layer.scale() is not None,
                   input_quantizer=layer.input_quantizer if layer._input_first else None)
        twin._fill(layer)
        return twin

    def _geometry_of(self, input: Tensor) -> tuple:
        """Stride, padding (top, bottom, left, right) and dilation for (N, C, H, W)."""
        return self._geometry

    def _convolve(self, input: Tensor) -> Tensor:
        """Of (N, C, H, W)."""
        stride, pads, dilation = self._geometry_of(input)
        if _onnx.is_exporting():
            return _onnx.packed_conv2d(
                self._quantized(input), self.weight_words, self.in_channels, stride, pads,
                dilation, self.groups, self.pad_value, self.scale, self.bias, self._dtype(input))
        own: Any = self._buffers  # an attribute of a module costs half a microsecond
        return _packed_conv2d(
            self._words(input, 1), self._filter(input), self.in_channels, stride, pads, dilation,
            self.groups, pad_value=self.pad_value, out_channels=self.out_channels,
            scale=own["scale"], bias=own["bias"], dtype=self._dtype(input),
            channels_last=wants_channels_last(input, input))

    def _checked(self, input: Tensor) -> Tensor:
        self._refuse_grad(input)
        dims = len(self.kernel_size) + 2
        if input.dim() not in (dims - 1, dims) or input.shape[1 - dims] != self.in_channels:
            raise RuntimeError(
                f"{type(self).__name__}: input must be (N, {self.in_channels}, ...) with {dims} "
                f"dimensions, or one less without N, got shape {tuple(input.shape)}")
        if self.padding_mode == "zeros":
            return input
        return F.pad(input, self._pads, mode=self.padding_mode)

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

    Input (N, Cin, H, W) or (Cin, H, W), real: its signs are packed, then convolved. The arguments
    are those of `nn.Conv2d`; scale says whether there is a factor per output channel, and
    input_quantizer is a custom quantizer to -1 and +1 that runs first.
    """

    _real = nn.Conv2d

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        input = self._checked(input)
        if input.dim() == 4:
            return self._convolve(input)
        return self._convolve(input.unsqueeze(0)).squeeze(0)


class PackedConv1d(_PackedConv):
    """A packed `BinaryConv1d`, see `PackedConv2d`. Input (N, Cin, L) or (Cin, L), real."""

    _real = nn.Conv1d

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        input = self._checked(input)
        batched = input if input.dim() == 3 else input.unsqueeze(0)
        out = self._convolve(batched.unsqueeze(-2)).squeeze(-2)
        return out if input.dim() == 3 else out.squeeze(0)


class PackedLinear(_Packed):
    """A packed `BinaryLinear`; made by its `pack()`, or empty to load a state_dict into.

    Input (..., in_features), real; output (..., out_features). scale says whether there is a factor
    per output, input_quantizer is a custom quantizer to -1 and +1 that runs first.
    """

    _arguments = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, *,
                 scale: bool = False, input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._channels = in_features
        self._register((out_features, word_count(in_features)), scale, bias, device,
                       input_quantizer)

    @classmethod
    def from_layer(cls, layer: Any) -> PackedLinear:
        """The twin of a binary linear layer that computes on bits."""
        twin = cls(layer.in_features, layer.out_features, layer.bias is not None,
                   layer.weight.device, scale=layer.scale() is not None,
                   input_quantizer=layer.input_quantizer if layer._input_first else None)
        twin._fill(layer)
        return twin

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        self._refuse_grad(input)
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise RuntimeError(f"PackedLinear: input must be (..., {self.in_features}), got shape "
                               f"{tuple(input.shape)}")
        if _onnx.is_exporting():
            return _onnx.packed_linear(
                self._quantized(input), self.weight_words, self.in_features, self.scale, self.bias,
                self._dtype(input))
        own: Any = self._buffers
        return _packed_linear(
            self._words(input, -1), self._filter(input), self.in_features,
            out_channels=self.out_features, scale=own["scale"], bias=own["bias"],
            dtype=self._dtype(input))

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, scale={self.scale is not None}")
