"""What the constructors of layers are called with, checked once for binary and packed ones."""

from __future__ import annotations

from typing import Any

from bitkernels._arguments import (
    choice,
    flag,
    integer,
    real_dtype,
    refuse,
    sizes,
)

PADDINGS = ("same", "valid")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def convolution(where: str, dims: int, in_channels: Any, out_channels: Any, kernel_size: Any,
                stride: Any, padding: Any, dilation: Any, groups: Any, bias: Any,
                padding_mode: Any, device: Any = None, dtype: Any = None) -> tuple[Any, ...]:
    """The arguments of `torch.nn.Conv1d/2d/3d` in its order."""
    return (*_channels(where, in_channels, out_channels),
            sizes(where, "kernel_size", kernel_size, dims),
            *(geometry(where, name, value, dims) for name, value in (
                ("stride", stride), ("padding", padding), ("dilation", dilation))),
            integer(where, "groups", groups), flag(where, "bias", bias),
            choice(where, "padding_mode", padding_mode, PADDING_MODES), device,
            real_dtype(where, dtype))


def transposed(where: str, dims: int, in_channels: Any, out_channels: Any, kernel_size: Any,
               stride: Any, padding: Any, output_padding: Any, groups: Any, bias: Any,
               dilation: Any, padding_mode: Any, device: Any = None, dtype: Any = None
               ) -> tuple[Any, ...]:
    """The arguments of `torch.nn.ConvTranspose1d/2d` in its order."""
    return (*_channels(where, in_channels, out_channels),
            sizes(where, "kernel_size", kernel_size, dims),
            geometry(where, "stride", stride, dims), sizes(where, "padding", padding, dims, 0),
            geometry(where, "output_padding", output_padding, dims),
            integer(where, "groups", groups), flag(where, "bias", bias),
            geometry(where, "dilation", dilation, dims),
            choice(where, "padding_mode", padding_mode, ("zeros",)), device,
            real_dtype(where, dtype))


def linear(where: str, in_features: Any, out_features: Any, bias: Any, device: Any = None,
           dtype: Any = None) -> tuple[Any, ...]:
    """The arguments of `torch.nn.Linear` in its order."""
    return (integer(where, "in_features", in_features, 0),
            integer(where, "out_features", out_features, 0), flag(where, "bias", bias), device,
            real_dtype(where, dtype))


def geometry(where: str, name: str, value: Any, dims: int) -> Any:
    """stride, padding, dilation or output_padding, also where it is assigned later."""
    if name == "padding" and isinstance(value, str):
        return choice(where, name, value, PADDINGS)
    return sizes(where, name, value, dims, 0 if "padding" in name else 1)


def _channels(where: str, in_channels: Any, out_channels: Any) -> tuple[int, int]:
    return (integer(where, "in_channels", in_channels, 0),
            integer(where, "out_channels", out_channels, 0))


def pad_value_of(where: str, pad_value: Any, padding_mode: str) -> int:
    """A pad_value that the padding mode has."""
    try:
        value = integer(where, "pad_value", pad_value, -1, 1)
    except ValueError:
        refuse(where, "pad_value", "-1, 0 or 1", pad_value)
    if value and padding_mode != "zeros":
        raise ValueError(f"{where}: pad_value={value} needs padding_mode='zeros', got "
                         f"{padding_mode!r}")
    return value
