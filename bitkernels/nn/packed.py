"""Inference twins of the binary layers: packed 1-bit weights, no latent ones, no gradients.

Buffers (all in the state_dict but `weight_tiles`):
  weight_words  int32 signs, (Cout, kh, kw, ceil(Cin/groups/32)) or (out, ceil(in/32))
  weight_tiles  the same as `tile_weight` orders them for CPU kernels; follows weight_words whenever
                a state_dict is loaded, and must be rebuilt by `retile` if they are changed by hand
  scale, bias   float32 (Cout,), or None

The output has the input's dtype (under autocast, the autocast dtype) and is equal, bit for bit, to
that of the layer it was packed from where that computes in float32. An input that requires grad is
an error of the operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels import _onnx
from bitkernels._checks import wants_channels_last, word_count
from bitkernels._fx import FxLeaf, traced_whole

_sign_pack = torch.ops.bitkernels.sign_pack.default
_tile_weight = torch.ops.bitkernels.tile_weight.default
_packed_conv2d = torch.ops.bitkernels.packed_conv2d.default
_packed_linear = torch.ops.bitkernels.packed_linear.default


def _retile(module: nn.Module, _incompatible_keys: Any) -> None:
    module.retile()  # type: ignore[operator]


class _Packed(FxLeaf):
    weight_words: Tensor
    weight_tiles: Tensor
    scale: Tensor | None
    bias: Tensor | None
    groups = 1

    def _register(self, words_shape: tuple[int, ...], scale: bool, bias: bool, device,
                  input_quantizer) -> None:
        def vector(wanted: bool, value: float) -> Tensor | None:
            return torch.full((words_shape[0],), value, device=device) if wanted else None

        words = torch.zeros(words_shape, dtype=torch.int32, device=device)
        self.register_buffer("weight_words", words)
        self.register_buffer("weight_tiles", None, persistent=False)
        self.register_buffer("scale", vector(scale, 1.0))
        self.register_buffer("bias", vector(bias, 0.0))
        self.input_quantizer = input_quantizer
        self.retile()
        self.register_load_state_dict_post_hook(_retile)

    def retile(self) -> None:
        """Rebuild weight_tiles from weight_words."""
        self.weight_tiles = _tile_weight(self.weight_words, self.groups)

    @torch.no_grad()
    def _fill(self, layer: Any) -> None:
        """Take over signs, scale and bias of a binary layer."""
        weight = layer.signs_of_weight()
        self.weight_words = _sign_pack(weight, None, 1).view(self.weight_words.shape)
        scale, bias = layer.scale(), layer.bias
        self.scale = None if scale is None else scale.float()
        self.bias = None if bias is None else bias.detach().float().clone()
        self.retile()
        self.train(layer.training)

    def _dtype(self, input: Tensor) -> torch.dtype:
        """The output's: the input's, or autocast's, as of the layer this was packed from."""
        device = input.device.type
        if (device in ("cpu", "cuda") and input.dtype != torch.float64
                and torch.is_autocast_enabled(device)):
            return torch.get_autocast_dtype(device)
        return input.dtype

    def _filter(self, input: Tensor) -> Tensor:
        """The layout that the input's backend reads without rearranging it."""
        return self.weight_tiles if input.is_cpu else self.weight_words

    def _words(self, input: Tensor, dim: int) -> Tensor:
        return _sign_pack(self._quantized(input), None, dim)

    def _quantized(self, input: Tensor) -> Tensor:
        return input if self.input_quantizer is None else self.input_quantizer(input)


class _PackedConv(_Packed):
    _real: type[nn.Module]

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

    def _convolve(self, input: Tensor) -> Tensor:
        """Of (N, C, H, W)."""
        stride, pads, dilation = self._geometry
        if _onnx.is_exporting():
            return _onnx.packed_conv2d(
                self._quantized(input), self.weight_words, self.in_channels, stride, pads,
                dilation, self.groups, self.pad_value, self.scale, self.bias, self._dtype(input))
        return _packed_conv2d(
            self._words(input, 1), self._filter(input), self.in_channels, stride, pads, dilation,
            self.groups, pad_value=self.pad_value, out_channels=self.out_channels,
            scale=self.scale, bias=self.bias, dtype=self._dtype(input),
            channels_last=wants_channels_last(input, input))

    def _checked(self, input: Tensor) -> Tensor:
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

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, *,
                 scale: bool = False, input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
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
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise RuntimeError(f"PackedLinear: input must be (..., {self.in_features}), got shape "
                               f"{tuple(input.shape)}")
        if _onnx.is_exporting():
            return _onnx.packed_linear(
                self._quantized(input), self.weight_words, self.in_features, self.scale, self.bias,
                self._dtype(input))
        return _packed_linear(
            self._words(input, -1), self._filter(input), self.in_features,
            out_channels=self.out_features, scale=self.scale, bias=self.bias,
            dtype=self._dtype(input))

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, scale={self.scale is not None}")
