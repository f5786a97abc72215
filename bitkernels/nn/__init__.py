"""Binary layers with the constructors and state_dict keys of `torch.nn`, and their packed twins."""

from bitkernels.nn.activations import RPReLU, RSign
from bitkernels.nn.conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from bitkernels.nn.conversion import BinarizeReport, NormSign, binarize, pack
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.linear import BinaryLinear
from bitkernels.nn.packed import PackedConv1d, PackedConv2d, PackedLinear
from bitkernels.nn.pool import MaxPool2d
from bitkernels.nn.residual_block import BinaryResidualBlock

__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryLayer",
    "BinaryLinear",
    "BinaryResidualBlock",
    "BinarizeReport",
    "MaxPool2d",
    "NormSign",
    "PackedConv1d",
    "PackedConv2d",
    "PackedLinear",
    "RPReLU",
    "RSign",
    "binarize",
    "pack",
]
