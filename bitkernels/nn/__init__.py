"""Binary layers with the constructors and state_dict keys of `torch.nn`, and their packed twins."""

from bitkernels.nn import parents as parents  # which looks at what binary layers are put into
from bitkernels.nn.activations import RPReLU, RSign
from bitkernels.nn.conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from bitkernels.nn.conv_transpose import BinaryConvTranspose1d, BinaryConvTranspose2d
from bitkernels.nn.conversion import (
    BinarizeReport,
    NormSign,
    binarize,
    load_packed,
    pack,
    save_packed,
)
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.linear import BinaryLinear
from bitkernels.nn.norm import SyncBatchNorm
from bitkernels.nn.options import Binarization
from bitkernels.nn.packed import PackedConv1d, PackedConv2d, PackedLinear
from bitkernels.nn.packed_transpose import PackedConvTranspose1d, PackedConvTranspose2d
from bitkernels.nn.pool import MaxPool2d
from bitkernels.nn.residual_block import BinaryResidualBlock, NoShortcut
from bitkernels.nn.same import PackedSameConv2d, SameConv2d

__all__ = [
    "Binarization",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryConvTranspose1d",
    "BinaryConvTranspose2d",
    "BinaryLayer",
    "BinaryLinear",
    "BinaryResidualBlock",
    "BinarizeReport",
    "MaxPool2d",
    "NoShortcut",
    "NormSign",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedLinear",
    "PackedSameConv2d",
    "RPReLU",
    "RSign",
    "SameConv2d",
    "SyncBatchNorm",
    "binarize",
    "load_packed",
    "pack",
    "save_packed",
]
