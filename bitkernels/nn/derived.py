"""The old name of `bitkernels.packed.WeightImage`, for packed layers that were pickled with it."""

from bitkernels.packed import WeightImage as Derived

__all__ = ["Derived"]
