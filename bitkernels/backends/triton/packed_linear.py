"""packed_linear: the 1 x 1 convolution of 1 x 1 images, in the kernels of the contraction."""

from __future__ import annotations

from bitkernels import reference
from bitkernels.backends.triton import gemm
from bitkernels.ops.geometry import empty_real, empty_words, linear_geometry


def packed_linear(words, weight_words, channels, *, out_channels=None, dtype=None, residual=None,
                  real=True, packed=False, inner, **parts):
    """(real tensor or None, packed signs or None); `inner`: one of those in `plan`."""
    shape = linear_geometry("packed_linear", words, weight_words, channels, out_channels)
    if weight_words.dim() == 3:
        weight_words = reference.untile_weight(weight_words, shape[-1])
    cout, width = shape[-1], words.shape[-1]
    out = empty_real(words, shape, dtype, False) if real else None
    signs = empty_words(words, shape[:-1], cout) if packed else None
    rows = words.numel() // width
    if residual is not None:
        residual = residual.reshape(rows, cout, 1, 1)
    gemm.contract(inner, words.reshape(rows, 1, 1, width).contiguous(),
                  weight_words.reshape(cout, 1, 1, width).contiguous(), channels, (1, 1),
                  (0, 0, 0, 0), (1, 1), 1, 0, (1, 1),
                  None if out is None else out.view(rows, cout, 1, 1), signs, residual, **parts)
    return out, signs
