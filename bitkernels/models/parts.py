"""What several networks share: TensorFlow's padding, batch norm without scale, weight options."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.nn import MaxPool2d
from bitkernels.nn.layer import WeightScale
from bitkernels.nn.same import same_pads
from bitkernels.quantizers import NoOp

# The standard deviation of a normal distribution that is cut at two of its own.
TRUNCATED_STD = 0.87962566103423978


def weight_options(binary: bool, quantizer: str | nn.Module = "ste_sign",
                   scale: WeightScale = None) -> dict[str, Any]:
    """The weight options of a binary layer, or those that leave its weights real."""
    if binary:
        return dict(weight_quantizer=quantizer, weight_scale=scale)
    return dict(weight_quantizer=NoOp(precision=32))


def keras_normal_(weight: Tensor, std: float) -> None:
    """Keras's he_normal and glorot_normal: normal, cut at two deviations, `std` after the cut."""
    nn.init.trunc_normal_(weight, std=std / TRUNCATED_STD, a=-2 * std / TRUNCATED_STD,
                          b=2 * std / TRUNCATED_STD)


def he_normal_(weight: Tensor) -> None:
    keras_normal_(weight, (2 / nn.init._calculate_fan_in_and_fan_out(weight)[0]) ** 0.5)


def glorot_normal_(weight: Tensor) -> None:
    keras_normal_(weight, (2 / sum(nn.init._calculate_fan_in_and_fan_out(weight))) ** 0.5)


class SamePad2d(FxLeaf):
    """Pixels around (N, C, H, W) so that a window then gives ceil(H / stride) by ceil(W / stride).

    TensorFlow's padding "same" (`bitkernels.nn.same`), which depends on the image's size. value: of
    these pixels.
    """

    def __init__(self, kernel_size: int, stride: int, value: float = 0.0) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.value = kernel_size, stride, value

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = (self.kernel_size,) * 2, (self.stride,) * 2
        top, bottom, left, right = same_pads(input.shape[-2:], kernel, stride)
        return F.pad(input, (left, right, top, bottom), value=self.value)

    def extra_repr(self) -> str:
        value = f", value={self.value}" if self.value else ""
        return f"kernel_size={self.kernel_size}, stride={self.stride}{value}"


def same_max_pool(kernel_size: int, stride: int) -> nn.Sequential:
    """TensorFlow's max pooling with padding "same": what is outside the image is never the most."""
    return nn.Sequential(SamePad2d(kernel_size, stride, float("-inf")),
                         MaxPool2d(kernel_size, stride))


class FlattenImage(FxLeaf):
    """(N, C, size, size) to (N, size * size * C), the channels last, as TensorFlow flattens images.

    Raises RuntimeError for another size, naming the image's size that the network was made for.
    """

    def __init__(self, size: int, image_size: int) -> None:
        super().__init__()
        self.size, self.image_size = size, image_size

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or tuple(input.shape[2:]) != (self.size, self.size):
            raise RuntimeError(
                f"the linear layers take maps of {self.size} x {self.size} pixels, as images of "
                f"{self.image_size} x {self.image_size} give; got a map of shape "
                f"{tuple(input.shape)}: build the network with the image_size of its images")
        return input.permute(0, 2, 3, 1).flatten(1)

    def extra_repr(self) -> str:
        return f"size={self.size}, image_size={self.image_size}"


class _Unscaled(FxLeaf, nn.modules.batchnorm._BatchNorm):
    """Batch norm with a learned shift and no scale (Keras's scale=False): weight is None."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class UnscaledBatchNorm1d(_Unscaled, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` without a scale; state_dict: bias and the running statistics."""


class UnscaledBatchNorm2d(_Unscaled, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` without a scale; state_dict: bias and the running statistics."""
