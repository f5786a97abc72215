"""Whole models: real layers to binary ones for training, binary ones to packed for inference."""

from bitkernels.nn.conversion.binarize import binarize
from bitkernels.nn.conversion.pack import pack

__all__ = ["binarize", "pack"]
