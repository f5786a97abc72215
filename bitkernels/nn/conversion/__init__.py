"""Whole models: real layers to binary ones for training, binary ones to packed for inference."""

from bitkernels.nn.conversion.binarize import binarize
from bitkernels.nn.conversion.norm_sign import NormSign
from bitkernels.nn.conversion.pack import pack
from bitkernels.nn.conversion.packed_file import load_packed, save_packed
from bitkernels.nn.conversion.report import BinarizeReport

__all__ = ["BinarizeReport", "NormSign", "binarize", "load_packed", "pack", "save_packed"]
