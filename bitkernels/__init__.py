"""bitkernels: binary neural networks in PyTorch on real 1-bit arithmetic."""

from bitkernels import (
    _batching,
    _ops,
    autograd,
    backends,
    metrics,
    models,
    nn,
    optim,
    quantizers,
    reference,
    residual_block,
)
from bitkernels.thresholds import fold_threshold

__version__ = "0.1.0"

__all__ = [
    "autograd",
    "backends",
    "fold_threshold",
    "metrics",
    "models",
    "nn",
    "optim",
    "quantizers",
    "reference",
    "residual_block",
]
