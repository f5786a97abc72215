"""bitkernels: binary neural networks in PyTorch on real 1-bit arithmetic.

    nn          layers, residual blocks, `binarize` and `pack`
    PackedTensor  packed activations, for packed layers
    models      networks by name                    imported when first used
    quantizers  signs and their estimators
    optim       Bop, and groups of binary parameters
    metrics     flips, saturation, dead weights
    ops         the operators, with their help
    train       recipes, image sets, `fit`          imported when first used
    interop     CuPy, NumPy, JAX, any DLPack        imported when first used
    explain     which kernel each layer gets, and why
    summary     what each layer weighs and computes imported when first used
    convert     a trained network as one on bits    imported when first used
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():  # torch says at import that NumPy is missing; nothing here needs it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch

from bitkernels import (
    _compile_cache,
    backends,
    metrics,
    nn,
    ops,
    optim,
    quantizers,
    reference,
)
from bitkernels.explain import explain
from bitkernels.packed import PackedTensor
from bitkernels.thresholds import fold_threshold

if TYPE_CHECKING:
    from bitkernels import autograd, interop, models, residual_block, train
    from bitkernels.converter import convert, load_converted, save_converted
    from bitkernels.counting import summary

__version__ = "0.1.0"
_compile_cache.mark()

__all__ = [
    "PackedTensor",
    "convert",
    "explain",
    "fold_threshold",
    "interop",
    "load_converted",
    "metrics",
    "models",
    "nn",
    "ops",
    "optim",
    "quantizers",
    "save_converted",
    "summary",
    "train",
]

_LAZY = ("autograd", "interop", "models", "residual_block", "train")
_LAZY_FUNCTIONS = {"summary": "bitkernels.counting", **dict.fromkeys(
    ("convert", "load_converted", "save_converted"), "bitkernels.converter")}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"bitkernels.{name}")
    if name in _LAZY_FUNCTIONS:
        return getattr(importlib.import_module(_LAZY_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'bitkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_FUNCTIONS} - {"Any", "TYPE_CHECKING", "importlib"})
