"""bitkernels: binary neural networks in PyTorch on real 1-bit arithmetic."""

import warnings

with warnings.catch_warnings():  # torch says at import that NumPy is missing; nothing here needs it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch

from bitkernels import (
    _ops,
    autograd,
    backends,
    conv_transpose,
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
    "conv_transpose",
    "fold_threshold",
    "metrics",
    "models",
    "nn",
    "optim",
    "quantizers",
    "reference",
    "residual_block",
]
