"""The kernels of csrc/cuda: `dispatch.attempt`, which `backends/gpu.py` asks before Triton.

NVRTC, the driver and the GPU are touched at the first call that may use them.
"""

from bitkernels.backends.cuda.dispatch import explain as explain
