"""The Triton kernels, for CUDA and HIP tensors: `dispatch.run`, which `backends/gpu.py` registers.

Triton, the kernels and the GPU are touched at the first call of an operator.
"""
