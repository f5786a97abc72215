"""Every kind of module of the package with an input, for the tests of PyTorch's toolchains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bitkernels.nn as bnn
from bitkernels import models, quantizers

Case = Callable[[], tuple[nn.Module, Tensor]]


def _images(channels: int = 8, *size: int) -> Tensor:
    return torch.randn(3, channels, *(size or (6, 6)))


def _block(**options) -> nn.Module:
    conv = bnn.BinaryConv2d(8, 8, 3, padding=1, bias=False, **options.pop("conv", {}))
    return bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(8), **options)


def _reactnet_block() -> nn.Module:
    return _block(sign=bnn.RSign(8), act=bnn.RPReLU(8), shortcut=nn.Identity(),
                  conv=dict(input_quantizer=None, weight_scale="detached"))


def _moved(module: nn.Module) -> nn.Module:
    """The module with parameters and running statistics that are not what they start as."""
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.uniform_(0.5, 1.5) if "var" in name else t.normal_()
    return module


CONVOLUTIONS: dict[str, Case] = {
    "conv2d": lambda: (bnn.BinaryConv2d(8, 5, 3), _images()),
    "conv2d same": lambda: (bnn.BinaryConv2d(8, 4, (3, 2), padding="same", dilation=2),
                            _images()),
    "conv2d strided groups": lambda: (
        bnn.BinaryConv2d(8, 6, 3, stride=2, padding=(1, 0), groups=2, bias=False), _images()),
    "conv2d same strided": lambda: (bnn.SameConv2d(8, 6, 3, (2, 1), weight_scale="detached"),
                                    _images(8, 6, 5)),
    "conv2d padded with +1": lambda: (
        bnn.BinaryConv2d(8, 4, 3, padding=1, pad_value=1, weight_scale="xnor"), _images()),
    "conv2d padded with -1": lambda: (
        bnn.BinaryConv2d(8, 4, 2, padding=1, pad_value=-1, weight_scale="magnitude_aware"),
        _images()),
    "conv2d reflect": lambda: (
        bnn.BinaryConv2d(8, 4, 3, padding=1, padding_mode="reflect", weight_scale="detached"),
        _images()),
    "conv2d circular": lambda: (
        bnn.BinaryConv2d(8, 4, 3, padding=(1, 2), padding_mode="circular"), _images()),
    "conv2d approx": lambda: (bnn.BinaryConv2d(8, 4, 3, input_quantizer="approx_sign"), _images()),
    "conv2d swish": lambda: (bnn.BinaryConv2d(8, 4, 3, input_quantizer="swish_sign"), _images()),
    "conv2d of signs": lambda: (bnn.BinaryConv2d(8, 4, 3, input_quantizer=None), _images()),
    "conv1d": lambda: (bnn.BinaryConv1d(8, 5, 3, stride=2, padding=1), _images(8, 7)),
    "conv1d replicate": lambda: (
        bnn.BinaryConv1d(8, 4, 3, padding=1, padding_mode="replicate", weight_scale="detached"),
        _images(8, 7)),
    "conv transpose2d": lambda: (
        bnn.BinaryConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1), _images()),
    "conv transpose2d groups": lambda: (
        bnn.BinaryConvTranspose2d(8, 6, 2, stride=(3, 1), groups=2, bias=False,
                                  weight_scale="xnor", dilation=(1, 2)), _images()),
    "conv transpose1d": lambda: (
        bnn.BinaryConvTranspose1d(8, 5, 4, stride=2, padding=1, weight_scale="detached",
                                  input_quantizer="approx_sign"), _images(8, 7)),
}
LINEAR: dict[str, Case] = {
    "linear": lambda: (bnn.BinaryLinear(40, 5), torch.randn(3, 40)),
    "linear of three dimensions": lambda: (
        bnn.BinaryLinear(8, 5, bias=False, weight_scale="xnor"), torch.randn(3, 2, 8)),
}
PACKABLE = CONVOLUTIONS | LINEAR

REAL: dict[str, Case] = {
    "conv3d": lambda: (bnn.BinaryConv3d(8, 4, 2, padding=1), _images(8, 3, 4, 4)),
    "conv2d of reals": lambda: (
        bnn.BinaryConv2d(8, 4, 3, input_quantizer=quantizers.NoOp(precision=32)), _images()),
    "conv2d dorefa": lambda: (
        bnn.BinaryConv2d(8, 4, 3, input_quantizer="dorefa_quantizer"), _images()),
    "conv transpose2d of reals": lambda: (
        bnn.BinaryConvTranspose2d(8, 4, 3, groups=2, weight_scale="detached",
                                  input_quantizer=quantizers.NoOp(precision=32)), _images()),
    "linear ternary": lambda: (
        bnn.BinaryLinear(8, 4, weight_quantizer="ste_tern"), torch.randn(3, 8)),
}
ACTIVATIONS: dict[str, Case] = {
    "rsign": lambda: (_moved(bnn.RSign(8)), _images()),
    "rsign ste": lambda: (_moved(bnn.RSign(8, "ste_sign")), _images()),
    "rsign swish": lambda: (_moved(bnn.RSign(8, "swish_sign")), torch.randn(3, 8)),
    "rprelu": lambda: (_moved(bnn.RPReLU(8)), _images()),
    "max pool": lambda: (bnn.MaxPool2d(3, stride=2, padding=1), _images()),
}
QUANTIZERS: dict[str, Case] = {
    name: (lambda name=name: (quantizers.get(name), _images())) for name in (
        "ste_sign", "approx_sign", "swish_sign", "magnitude_aware_sign", "ste_heaviside",
        "ste_tern", "dorefa_quantizer")}
BLOCKS: dict[str, Case] = {
    "block": lambda: (_moved(_block()), _images()),
    "block of reactnet": lambda: (_moved(_reactnet_block()), _images()),
    "block of quicknet": lambda: (
        _moved(_block(relu=True, act=nn.PReLU(), conv=dict(pad_value=1))), _images()),
    "block unfused": lambda: (
        _moved(_block(conv=dict(input_quantizer="dorefa_quantizer"))), _images()),
}
MODELS: dict[str, Case] = {
    "binarynet": lambda: (_moved(models.BinaryNet(5, image_size=14, width=8)),
                          torch.randn(3, 3, 14, 14)),
    "quicknet": lambda: (_moved(models.QuickNet(5, blocks=(1, 1), filters=(8, 16))),
                         torch.randn(3, 3, 8, 8)),
    "reactnet": lambda: (_moved(models.ReActNet(5, channels=(8, 16, 16, 32))),
                         torch.randn(3, 3, 8, 8)),
    "reactnet of real weights": lambda: (
        _moved(models.ReActNet(5, channels=(8, 16), binary_weights=False)),
        torch.randn(3, 3, 8, 8)),
}
MODULES = PACKABLE | REAL | ACTIVATIONS | QUANTIZERS | BLOCKS
PACKED: dict[str, Case] = {
    f"packed {name}": (lambda case=case: _packed(*case())) for name, case in PACKABLE.items()}


def _packed(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return layer.pack().eval(), x


def pack(model: nn.Module) -> nn.Module:
    """The model packed where it can be; BinaryNet's first layer has a real input."""
    return bnn.pack(model, filter=lambda name, layer: layer.pack_obstacle() is None)


# Modules on one input, for tools that take a second a network.
GROUPS = {
    "convolutions": ["conv2d", "conv2d same", "conv2d strided groups", "conv2d padded with +1",
                     "conv2d padded with -1"],
    "padded convolutions": ["conv2d reflect", "conv2d circular", "conv2d of signs",
                            "conv2d approx", "conv2d swish"],
    "transposed": ["conv transpose2d", "conv transpose2d groups"],
    "one dimension": ["conv1d", "conv1d replicate", "conv transpose1d"],
    "linear": ["linear"],
    "linear of three dimensions": ["linear of three dimensions"],
    "real operands": ["conv2d of reals", "conv2d dorefa", "conv transpose2d of reals"],
    "three dimensions": ["conv3d"],
    "activations": ["rsign", "rsign ste", "rprelu", "max pool", *QUANTIZERS],
    "blocks": list(BLOCKS),
}


class Branches(nn.Module):
    """Several modules on one input."""

    def __init__(self, modules) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(x) for branch in self.branches)


def branches(group: str, packed: bool = True) -> tuple[Branches, Tensor]:
    """The modules of a group and, with `packed`, the packed twins of those that have one."""
    made = [MODULES[name]() for name in GROUPS[group]]
    modules = [module for module, _ in made]
    if packed:
        modules += [m.pack() for m in modules
                    if isinstance(m, bnn.BinaryLayer) and m.pack_obstacle() is None]
    return Branches(modules), made[0][1]
