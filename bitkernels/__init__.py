"""bitkernels: binary neural networks in PyTorch on real 1-bit arithmetic."""

from bitkernels import _ops, autograd, backends, nn, optim, quantizers, reference

__version__ = "0.1.0"

__all__ = ["autograd", "backends", "nn", "optim", "quantizers", "reference"]
