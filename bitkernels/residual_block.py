"""The operator of a residual block, by the path that it had first; see `bitkernels.ops`."""

from bitkernels.ops import binary_residual_block

__all__ = ["binary_residual_block"]
