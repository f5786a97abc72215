"""Cases of the operators, shared by the tests of every backend, and makers of their inputs.

Each case is small: what it varies is the geometry, which is where kernels go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitkernels import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def word_count(channels: int) -> int:
    return -(-channels // 32)


def reals(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Normal values with exact 0, -0.0, 1 and -1 among them: the edges of sign and of its clip."""
    x = torch.randn(shape, dtype=torch.float64)
    flat = x.view(-1)
    flat[1::11], flat[3::17], flat[5::19], flat[7::23] = 0.0, -0.0, 1.0, -1.0
    return x.to(device, dtype)


def dyadic(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Multiples of 1/4 in [-4, 4]: sums with small integers are exact in every order."""
    return (torch.randint(-16, 17, shape) / 4).to(device, dtype)


def signed(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def words_of(*shape: int, device="cpu") -> Tensor:
    """Random words of bits (..., channels), tail bits 0."""
    return reference.pack_bits(torch.rand(shape) < 0.5).to(device)


@dataclass(frozen=True)
class ConvCase:
    channels: int = 64
    out_channels: int = 16
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    pad_value: int = 0
    batch: int = 2

    def __str__(self) -> str:
        def x(values):
            return "x".join(str(v) for v in values)

        return (f"n{self.batch}c{self.channels}o{self.out_channels}_{x(self.size)}"
                f"_k{x(self.kernel)}_s{x(self.stride)}_p{x(self.padding)}_d{x(self.dilation)}"
                f"_g{self.groups}_v{self.pad_value}")

    @property
    def args(self) -> tuple:
        """(stride, padding, dilation, groups) as the operators take them."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, *self.size

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.channels // self.groups, *self.kernel

    @property
    def pad4(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        if len(self.padding) == 4:
            return self.padding
        return self.padding[0], self.padding[0], self.padding[-1], self.padding[-1]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        top, bottom, left, right = self.pad4
        height, width = (
            (self.size[i] + pad - self.dilation[-1 if i else 0] * (self.kernel[i] - 1) - 1)
            // self.stride[-1 if i else 0] + 1
            for i, pad in ((0, top + bottom), (1, left + right)))
        return self.batch, self.out_channels, height, width

    def words(self, device="cpu") -> tuple[Tensor, Tensor]:
        """Random (words, weight_words) of this case."""
        n, c, h, w = self.input_shape
        o, i, kh, kw = self.weight_shape
        return words_of(n, h, w, c, device=device), words_of(o, kh, kw, i, device=device)

    def reals(self, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
        """Random real (input, weight) of this case."""
        return (reals(*self.input_shape, dtype=dtype, device=device),
                reals(*self.weight_shape, dtype=dtype, device=device))


CONV_CASES = (
    # channels: one word and less, around a word, many words
    ConvCase(channels=1), ConvCase(channels=3, out_channels=7), ConvCase(channels=31),
    ConvCase(channels=32), ConvCase(channels=33, out_channels=31), ConvCase(channels=100),
    ConvCase(channels=256, size=(4, 4)), ConvCase(channels=287, size=(3, 4)),
    ConvCase(channels=512, out_channels=8, size=(3, 3)),
    ConvCase(channels=1025, out_channels=5, size=(3, 3)),
    ConvCase(channels=4096, size=(2, 2), kernel=(1, 1), padding=(0,)),
    ConvCase(channels=4095, out_channels=3, size=(2, 2), kernel=(2, 2), padding=(1, 1)),
    # output channels: partial and several tiles
    ConvCase(out_channels=1), ConvCase(out_channels=7), ConvCase(out_channels=31),
    ConvCase(out_channels=33), ConvCase(out_channels=64), ConvCase(out_channels=100),
    # kernels
    ConvCase(kernel=(1, 1), padding=(0, 0)), ConvCase(kernel=(5, 5), padding=(2,)),
    ConvCase(kernel=(1, 3), padding=(0, 1)), ConvCase(kernel=(3, 1), channels=40),
    ConvCase(kernel=(2, 4), size=(7, 5), channels=96), ConvCase(kernel=(7, 7), padding=(3,)),
    ConvCase(kernel=(1, 1), padding=(1, 2), channels=48),
    # stride and dilation
    ConvCase(stride=(2, 2), size=(7, 7)), ConvCase(stride=(2,), size=(6, 9), channels=70),
    ConvCase(stride=(3, 3), size=(8, 7)), ConvCase(stride=(2, 1), channels=35),
    ConvCase(stride=(2, 2), kernel=(1, 1), padding=(0,), size=(7, 6)),
    ConvCase(dilation=(2, 2), size=(7, 8), padding=(2, 2)), ConvCase(dilation=(3,), size=(9, 9)),
    ConvCase(dilation=(1, 2), stride=(2, 1), size=(9, 7), channels=65),
    # groups, also of a number of channels which is no multiple of 32
    ConvCase(groups=2, channels=128), ConvCase(groups=2, channels=66, out_channels=14),
    ConvCase(groups=3, channels=99, out_channels=33), ConvCase(groups=4, channels=20),
    ConvCase(groups=16, channels=16), ConvCase(groups=33, channels=33, out_channels=66),
    ConvCase(groups=4, channels=128, out_channels=100, stride=(2, 2)),
    ConvCase(groups=2, channels=6, out_channels=4, pad_value=1),
    # depthwise: a window for each channel
    ConvCase(groups=70, channels=70, out_channels=70, size=(7, 11)),
    ConvCase(groups=33, channels=33, out_channels=33, pad_value=-1, stride=(2, 1)),
    ConvCase(groups=40, channels=40, out_channels=40, dilation=(1, 2), padding=(0, 1, 2, 1)),
    # padding: each kind, each value, more than the image
    ConvCase(padding=(0,)), ConvCase(padding=(2, 1), channels=37),
    ConvCase(padding=(0, 1, 2, 0)), ConvCase(padding=(1, 0, 0, 1), stride=(2, 2), channels=36),
    ConvCase(padding=(4, 0, 1, 5), size=(2, 3), pad_value=-1, channels=33),
    ConvCase(padding=(7, 7), size=(2, 3)), ConvCase(padding=(9,), size=(1, 1), stride=(2, 2)),
    ConvCase(pad_value=1), ConvCase(pad_value=-1), ConvCase(pad_value=1, channels=45),
    ConvCase(pad_value=-1, channels=45, padding=(2, 0, 1, 3)),
    ConvCase(pad_value=1, channels=90, groups=2, stride=(2, 2), padding=(0, 1, 0, 1)),
    ConvCase(pad_value=1, dilation=(2, 2), padding=(2,), channels=34),
    # image and batch
    ConvCase(size=(1, 1)), ConvCase(size=(1, 1), kernel=(1, 1), padding=(0,), channels=50),
    ConvCase(size=(1, 7)), ConvCase(size=(13, 1), batch=1), ConvCase(size=(13, 11), batch=1),
    ConvCase(batch=0), ConvCase(batch=0, kernel=(1, 1), padding=(0,)), ConvCase(batch=3),
)

# One case of each feature, for tests which are a product with something else.
FEW_CONV_CASES = (
    ConvCase(channels=33, out_channels=7), ConvCase(kernel=(1, 1), padding=(0,), out_channels=33),
    ConvCase(groups=2, channels=90, out_channels=20, stride=(2, 1), padding=(0, 1, 2, 1)),
    ConvCase(channels=40, pad_value=1, dilation=(2, 1), out_channels=31),
    ConvCase(channels=16, groups=16, pad_value=-1), ConvCase(batch=0, channels=31),
)


@dataclass(frozen=True)
class LinearCase:
    channels: int
    out_channels: int
    batch: tuple[int, ...] = (3,)

    def __str__(self) -> str:
        return f"{'x'.join(str(b) for b in self.batch) or 'vector'}_c{self.channels}" \
               f"o{self.out_channels}"

    def words(self, device="cpu") -> tuple[Tensor, Tensor]:
        return (words_of(*self.batch, self.channels, device=device),
                words_of(self.out_channels, self.channels, device=device))

    def reals(self, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
        return (reals(*self.batch, self.channels, dtype=dtype, device=device),
                reals(self.out_channels, self.channels, dtype=dtype, device=device))


LINEAR_CASES = (
    *(LinearCase(c, 7) for c in (1, 2, 31, 32, 33, 63, 64, 65, 100, 127, 255, 257, 512, 1000)),
    *(LinearCase(70, o) for o in (1, 15, 16, 17, 31, 33, 64, 100)),
    LinearCase(4096, 33, (5,)), LinearCase(4095, 10, (1,)), LinearCase(9000, 3, (2,)),
    LinearCase(40, 20, ()), LinearCase(40, 20, (0,)), LinearCase(40, 20, (1,)),
    LinearCase(64, 16, (17,)), LinearCase(40, 20, (2, 3)), LinearCase(40, 20, (2, 0, 3)),
    LinearCase(96, 48, (2, 1, 3, 2)),
)


@dataclass(frozen=True)
class PoolCase:
    kernel: tuple[int, ...] = (2, 2)
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    ceil_mode: bool = False
    size: tuple[int, int] = (7, 8)
    channels: int = 40
    batch: int = 2

    def __str__(self) -> str:
        def x(values):
            return "x".join(str(v) for v in values)

        return (f"n{self.batch}c{self.channels}_{x(self.size)}_k{x(self.kernel)}_s{x(self.stride)}"
                f"_p{x(self.padding)}_d{x(self.dilation)}{'_ceil' * self.ceil_mode}")

    @property
    def args(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode


POOL_CASES = (
    PoolCase(), PoolCase((3, 3)), PoolCase((3,)), PoolCase((2, 3)), PoolCase((1, 1)),
    PoolCase((2, 2), (1, 1)), PoolCase((3, 3), (2, 2), (1, 1)), PoolCase((3, 3), (2, 1), (1, 0)),
    PoolCase((2,), (3,)), PoolCase((3, 2), (1, 2), (1, 1)),
    PoolCase((3, 3), (2, 2), (1,), ceil_mode=True), PoolCase((2, 2), ceil_mode=True),
    PoolCase((2, 2), (3, 3), (1, 1), ceil_mode=True, size=(5, 9)),
    PoolCase((3, 3), (1, 1), (1,), (2, 2)), PoolCase((2, 3), (2, 1), (0, 1), (3, 2)),
    PoolCase((3, 3), (2, 2), (1, 1), (2, 1), ceil_mode=True, size=(9, 6)),
    PoolCase((5, 5), (1, 1), (2, 2), size=(3, 2)), PoolCase(size=(2, 2), channels=1),
    PoolCase(size=(1, 1), kernel=(1, 1), channels=32), PoolCase(channels=33, batch=0),
    PoolCase((3, 3), (2, 2), (1, 1), channels=100, batch=1, size=(55, 3)),
    PoolCase((3, 3), channels=4096, size=(3, 3), batch=1),
)

# The memory formats of images that PyTorch has fast paths for.
FORMATS = (torch.contiguous_format, torch.channels_last)

# The layouts in which a tensor of a given shape may arrive; each keeps the values of `x`.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: _inside(x, 2),
    "offset": lambda x: _inside(x, 1),
    "expanded": lambda x: x[:1].expand_as(x),
}


def in_turn(cases: Sequence, choices: Callable[[object], Sequence]) -> list:
    """Parameters (choice, case): each case with one of its choices, the next one for the next case.

    The other pairs are marked `every`, which is left to .ci/run.
    """
    return [pytest.param(choice, case, marks=() if i % len(may) == j else pytest.mark.every)
            for i, case in enumerate(cases) for may in (choices(case),)
            for j, choice in enumerate(may)]


def _inside(x: Tensor, step: int) -> Tensor:
    """x as a view of a larger tensor: every `step`-th element, from an odd storage offset."""
    room = x.new_full([s * step + 3 for s in x.shape], -7.0)
    view = room[tuple(slice(1, 1 + s * step, step) for s in x.shape)]
    view.copy_(x)
    return view


EPILOGUES = {
    "none": (),
    "relu": ("clamp_min",),
    "clamp": ("clamp_min", "clamp_max"),
    "scale": ("scale",),
    "bias": ("bias",),
    "affine": ("scale", "bias"),
    "relu_affine": ("clamp_min", "scale", "bias"),
    "residual": ("residual",),
    "affine_residual": ("scale", "bias", "residual"),
    "slope": ("slope",),
    "rprelu": ("shift_in", "slope", "shift_out"),
    "slope_shift_out": ("slope", "shift_out"),
    "all": ("clamp_min", "clamp_max", "scale", "bias", "residual", "shift_in", "slope",
            "shift_out"),
}


def epilogue_parts(names: tuple[str, ...], shape, channel_dim: int, device="cpu",
                   dtype=torch.float32, residual_dtype=torch.float32) -> dict:
    """Random values of the named parts of an epilogue on an output of `shape`."""
    values = dict(clamp_min=0.0, clamp_max=9.0)
    for name in names:
        if name == "residual":
            values[name] = (3 * reals(*shape)).to(device, residual_dtype)
        elif name not in values:
            values[name] = (reals(shape[channel_dim]) / 3).to(device, dtype)
    return {name: values[name] for name in names}
