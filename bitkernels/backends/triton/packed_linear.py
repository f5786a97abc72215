"""packed_linear: the 1 x 1 convolution of 1 x 1 images, in the kernels of the contraction."""

from __future__ import annotations

from bitkernels import reference
from bitkernels.backends.triton import configs, gemm
from bitkernels.ops.geometry import empty_real, empty_words, linear_geometry


def packed_linear(words, weight_words, channels, *, out_channels=None, dtype=None, residual=None,
                  real=True, packed=False, inner=None, **parts):
    """(real tensor or None, packed signs or None); `inner` forces the inner product."""
    shape = linear_geometry("packed_linear", words, weight_words, channels, out_channels)
    if weight_words.dim() == 3:
        weight_words = reference.untile_weight(weight_words, shape[-1])
    cout, width = shape[-1], words.shape[-1]
    out = empty_real(words, shape, dtype, False) if real else None
    signs = empty_words(words, shape[:-1], cout) if packed else None
    if inner is None:
        inner = _fitting(words, shape[-1])[0]
    if residual is not None:
        residual = residual.reshape(-1, cout, 1, 1)
    gemm.contract(inner, words.reshape(-1, 1, 1, width).contiguous(),
                  weight_words.reshape(cout, 1, 1, width).contiguous(), channels, (1, 1),
                  (0, 0, 0, 0), (1, 1), 1, 0, (1, 1),
                  None if out is None else out.view(-1, cout, 1, 1), signs, residual, **parts)
    return out, signs


def _fitting(words, columns) -> tuple[str, ...]:
    width = words.shape[-1]
    rows = words.numel() // width
    addressable = max(4 * words.numel(), 4 * columns * width, rows * columns) < 2**31
    return gemm.choose(configs.family(words.device), rows, columns, width, True, 1, addressable)


def inner_products(words, weight_words, channels, *, out_channels=None, **kw) -> tuple[str, ...]:
    """Those which take this call, the preferred first; none where float64 is involved."""
    if not gemm.takes(**kw):
        return ()
    return _fitting(words, linear_geometry("packed_linear", words, weight_words, channels,
                                           out_channels)[-1])
