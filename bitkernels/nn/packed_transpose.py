"""Inference twins of the binary transposed convolutions; see `bitkernels.nn.packed`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitkernels import _onnx
from bitkernels._fx import traced_whole
from bitkernels.nn import arguments
from bitkernels.nn.packed import _Packed, _sign_pack, _tile_weight
from bitkernels.ops._phases import transposed_geometry
from bitkernels.ops.binary_conv_transpose2d import by_output
from bitkernels.ops.geometry import wants_channels_last, word_count
from bitkernels.ops.packed_conv_transpose2d import by_phases, phase_filters, phases2d
from bitkernels.packed import PackedTensor

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_packed_conv_transpose2d = torch.ops.bitkernels.packed_conv_transpose2d.default


def _filters(words: Tensor, groups: int, kernel, stride, padding,
             dilation) -> list[Tensor]:
    """The filters of each phase, tiled where CPU kernels will read them."""
    # Output padding adds outputs to phases, and changes no taps.
    filters = phase_filters(words, phases2d(kernel, stride, padding, (0, 0), dilation))
    if not words.is_cpu:
        return filters
    return [_tile_weight(filter, groups) for filter in filters]


class _PackedConvTranspose(_Packed):
    _real: type[nn.Module]
    _arguments = ("in_channels", "out_channels", "kernel_size", "stride", "padding",
                  "output_padding", "groups", "dilation", "padding_mode")
    _image_of = staticmethod(_filters)

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0,
                 output_padding=0, groups: int = 1, bias: bool = True, dilation=1,
                 padding_mode: str = "zeros", device=None, *, scale: bool = False,
                 input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        dims = 1 if self._real is nn.ConvTranspose1d else 2
        # The real layer knows what fits together.
        real: Any = self._real(*arguments.transposed(
            type(self).__name__, dims, in_channels, out_channels, kernel_size, stride, padding,
            output_padding, groups, bias, dilation, padding_mode, "meta"))
        in_channels, out_channels, groups = real.in_channels, real.out_channels, real.groups
        self.in_channels, self.out_channels = in_channels, out_channels
        self._channels, self._dims = in_channels, dims
        self.kernel_size, self.stride, self.padding = real.kernel_size, real.stride, real.padding
        self.output_padding, self.dilation = real.output_padding, real.dilation
        self.groups, self.padding_mode = groups, padding_mode
        one, none = ((1,), (0,)) if len(self.kernel_size) == 1 else ((), ())  # height 1 for 1d
        kernel = (*one, *self.kernel_size)
        self._geometry = (kernel, (*one, *self.stride), (*none, *self.padding),
                          (*one, *self.dilation))
        self._register((out_channels, *kernel, word_count(in_channels // groups)), scale, bias,
                       device, input_quantizer)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def _by_output(self, weight: Tensor) -> Tensor:
        return by_output(weight, self.groups)

    def _image_key(self) -> tuple[Any, ...]:
        return (self.groups, *self._geometry)

    @traced_whole
    def forward(self, input: Tensor | PackedTensor, output_size: list[int] | None = None) -> Tensor:
        self._check(input)
        transposed: Any = nn.modules.conv._ConvTransposeNd
        sized = (torch.empty(input.shape, device="meta") if isinstance(input, PackedTensor)
                 else input)
        output_padding = transposed._output_padding(
            self, sized, output_size, self.stride, self.padding, self.kernel_size, self._dims,
            self.dilation)
        return self._on_images(input, (*(0,) * (2 - self._dims), *output_padding))

    def _convolve(self, x: Tensor, packed: bool, dtype: torch.dtype, output_padding) -> Tensor:
        kernel, stride, padding, dilation = self._geometry
        if _onnx.is_exporting():
            return _onnx.packed_conv_transpose2d(
                x, self.weight_words, self.in_channels, stride, padding,
                output_padding, self.groups, dilation, self.scale, self.bias, dtype)
        weight_words: Any = self._buffers["weight_words"]
        words = x if packed else _sign_pack(x, None, 1)
        channels_last = packed or wants_channels_last(x, x)
        filters = self.weight_image()
        if filters is weight_words or _is_wrapped(x):  # the operator has a rule for vmap
            return _packed_conv_transpose2d(
                words, weight_words, self.in_channels, stride, padding, output_padding, self.groups,
                dilation, scale=self.scale, bias=self.bias, dtype=dtype,
                channels_last=channels_last)
        size, *_ = transposed_geometry("packed_conv_transpose2d", "input", words.shape[1:3],
                                       kernel, stride, padding, output_padding, dilation)
        every = phases2d(kernel, stride, padding, output_padding, dilation)
        return by_phases(words, filters, every, self.in_channels, (self.out_channels, *size),
                         stride, self.groups, self.scale, self.bias, dtype, channels_last)

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}, padding={self.padding}, "
                f"output_padding={self.output_padding}, groups={self.groups}, "
                f"bias={self.bias is not None}, dilation={self.dilation}, "
                f"scale={self.scale is not None}")


class PackedConvTranspose2d(_PackedConvTranspose):
    """A packed `BinaryConvTranspose2d`; made by its `pack()`, or empty to load a state_dict into.

    Input (N, Cin, H, W) or (Cin, H, W), real: its signs are packed, then convolved. The arguments
    are those of `nn.ConvTranspose2d`, also `forward(input, output_size=None)`; scale says whether
    there is a factor per output channel, and input_quantizer is a custom quantizer to -1 and +1
    that runs first. weight_words are (Cout, kh, kw, ceil(Cin / groups / 32)), by output channel as
    in all packed layers; the filters of each phase of the output are derived from them.
    """

    _real = nn.ConvTranspose2d


class PackedConvTranspose1d(_PackedConvTranspose):
    """A packed `BinaryConvTranspose1d`, see `PackedConvTranspose2d`. Input (N, Cin, L) or (Cin, L),
    real."""

    _real = nn.ConvTranspose1d
