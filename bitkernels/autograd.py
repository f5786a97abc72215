"""The differentiable operators, by the path that they had first; see `bitkernels.ops`."""

from bitkernels.ops import binary_conv2d, binary_linear, rprelu, rsign

__all__ = ["binary_conv2d", "binary_linear", "rprelu", "rsign"]
