"""What a network weighs and multiplies, layer by layer: `bitkernels.summary`."""

from bitkernels.counting.result import LarqTotals, Layer, Operations, Summary
from bitkernels.counting.run import summary

__all__ = ["LarqTotals", "Layer", "Operations", "Summary", "summary"]
