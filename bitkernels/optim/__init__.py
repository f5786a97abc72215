"""Optimizers for binary weights, and one face for several optimizers."""

from bitkernels.optim.bop import Bop, Bop2ndOrder
from bitkernels.optim.grouping import (
    CaseOptimizer,
    binary_weights,
    clip_latent_weights,
    is_binary_weight,
)
from bitkernels.optim.schedule import ScheduledHyperparameter

__all__ = [
    "Bop",
    "Bop2ndOrder",
    "CaseOptimizer",
    "ScheduledHyperparameter",
    "binary_weights",
    "clip_latent_weights",
    "is_binary_weight",
]
