"""Registers the Triton kernels for CUDA and HIP tensors.

Importing registers launchers and nothing else: Triton, the kernels and the GPU are touched at the
first call of an operator.
"""

from bitkernels.backends.launchers import register
from bitkernels.backends.triton.dispatch import run

register("CUDA", run)
