"""The networks of bench_models.py: binary ones and their emulation, ResNet-18 and MobileNetV2.

The real ones are written here because torchvision's wheel asks for torch's CUDA build.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitkernels.nn as bnn
from bitkernels.models import create_model
from bitkernels.nn.same import SameConv2d, same_pads

BINARY = ("quicknet_small", "quicknet", "quicknet_large", "reactnet_a", "reactnet18", "birealnet18",
          "real_to_binary_net", "bnext_t")


def with_statistics(model: nn.Module, size: int) -> nn.Module:
    """In evaluation, its norms with the statistics of a batch of noise: untrained values would grow
    from layer to layer, and every sign of a channel would be the same."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval().requires_grad_(False)


def binary_network(name: str, size: int) -> nn.Module:
    return with_statistics(create_model(name), size)


class EmulatedConv(nn.Module):
    """A binary convolution in real numbers: -1 and +1, times the scale, by F.conv2d."""

    def __init__(self, conv: bnn.BinaryConv2d) -> None:
        super().__init__()
        self.signs = conv.input_quantizer is not None
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.groups, self.pad_value = conv.groups, conv.pad_value
        self.pads = None if isinstance(conv, SameConv2d) else conv.pads_of((1, 1))
        self.weight = nn.Parameter(conv.binary_weight(scaled=True), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.signs:
            x = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
        top, bottom, left, right = self.pads or same_pads(
            x.shape[2:], self.kernel_size, self.stride, self.dilation)
        pads = (top, left)
        if self.pad_value or (top, left) != (bottom, right):
            x, pads = F.pad(x, (left, right, top, bottom), value=float(self.pad_value)), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, pads, self.dilation, self.groups)


class EmulatedSign(nn.Module):
    def __init__(self, sign: bnn.RSign) -> None:
        super().__init__()
        self.shift = nn.Parameter(sign.shift.detach().view(-1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x + self.shift < 0, -1.0, 1.0).to(x.dtype)


class EmulatedActivation(nn.Module):
    def __init__(self, act: bnn.RPReLU) -> None:
        super().__init__()
        self.slope = nn.Parameter(act.slope.detach(), requires_grad=False)
        self.shift_in, self.shift_out = (
            nn.Parameter(s.detach().view(-1, 1, 1), requires_grad=False)
            for s in (act.shift_in, act.shift_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x + self.shift_in, self.slope) + self.shift_out


class EmulatedBlock(nn.Module):
    """The layers of a residual block, one after the other."""

    def __init__(self, block: bnn.BinaryResidualBlock) -> None:
        super().__init__()
        self.sign, self.conv, self.norm = block.sign, block.conv, block.norm
        self.act, self.shortcut, self.relu = block.act, block.shortcut, block.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x if self.sign is None else self.sign(x))
        y = self.norm(y.relu() if self.relu else y)
        if not isinstance(self.shortcut, bnn.NoShortcut):
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return y if self.act is None else self.act(y)


EMULATED: tuple[tuple[type[nn.Module], Callable], ...] = (
    (bnn.BinaryResidualBlock, EmulatedBlock), (bnn.BinaryConv2d, EmulatedConv),
    (bnn.RSign, EmulatedSign), (bnn.RPReLU, EmulatedActivation),
    (bnn.MaxPool2d, lambda pool: nn.MaxPool2d(pool.kernel_size, pool.stride, pool.padding)))


def emulation(model: nn.Module) -> nn.Module:
    """The network in PyTorch's own operators, with the binary weights made beforehand."""
    model = copy.deepcopy(model)
    _emulate(model)
    return model.eval()


def _emulate(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        for cls, emulated in EMULATED:
            if isinstance(child, cls):
                child = emulated(child)
                setattr(module, name, child)
                break
        _emulate(child)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
              ) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """act(body(x) + shortcut(x)); the sum is a module, which FX quantizes with what follows."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """He et al. 2015, as in torchvision."""
    layers = [*conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        for block in range(2):
            stride = 2 if block == 0 and outputs > 64 else 1
            body = nn.Sequential(*conv_norm(inputs, outputs, 3, stride), nn.ReLU(),
                                 *conv_norm(outputs, outputs, 3))
            shortcut = (nn.Identity() if inputs == outputs
                        else nn.Sequential(*conv_norm(inputs, outputs, 1, stride)))
            layers.append(Residual(body, shortcut, nn.ReLU()))
            inputs = outputs
    return nn.Sequential(*layers, *head(512))


# Of MobileNetV2: expansion, channels, blocks, stride of the first.
INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018, as in torchvision (without its dropout)."""
    layers = [*conv_norm(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for expansion, outputs, blocks, first in INVERTED:
        for block in range(blocks):
            stride, hidden = first if block == 0 else 1, inputs * expansion
            body = [*conv_norm(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
            body += [*conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6(),
                     *conv_norm(hidden, outputs, 1)]
            inner = nn.Sequential(*body)
            layers.append(Residual(inner, nn.Identity(), nn.Identity())
                          if stride == 1 and inputs == outputs else inner)
            inputs = outputs
    return nn.Sequential(*layers, *conv_norm(inputs, 1280, 1), nn.ReLU6(), *head(1280))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


REAL: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}


def real_network(name: str, size: int) -> nn.Module:
    return with_statistics(REAL[name](), size)


def int8_eager(model: nn.Module, images: Tensor) -> nn.Module:
    """Static int8 of PyTorch's x86 backend (FX graph mode), calibrated on the images."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of its deprecation for torchao, whose int8 only compiles
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), images)
        prepared(images)
        return convert_fx(prepared)


def int8_compiled(model: nn.Module, images: Tensor) -> nn.Module:
    """Static int8 of torchao (PT2E) for Inductor on x86: a graph to compile with freezing."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch")}
        graph = torch.export.export(model, (images,), dynamic_shapes=(batch,)).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        prepared(images)
        return move_exported_model_to_eval(convert_pt2e(prepared))
