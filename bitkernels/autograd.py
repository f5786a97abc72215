"""The differentiable operators, by the path that release 0.1.0 had; see `bitkernels.ops`."""

from bitkernels.ops import binary_conv2d, binary_linear, rprelu, rsign

__all__ = ["binary_conv2d", "binary_linear", "rprelu", "rsign"]
