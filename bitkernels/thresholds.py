"""Folding of an epilogue that ends in a sign into integer bounds on the dot product."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import reference
from bitkernels._arguments import integer, number
from bitkernels.ops._checks import INT_MAX, check_channel_vector, fail

INT_MIN = -INT_MAX - 1


def fold_threshold(products: int, *, clamp_min: float | None = None, clamp_max: float | None = None,
                   scale: Tensor | None = None, bias: Tensor | None = None,
                   sign_shift: Tensor | None = None, out_channels: int | None = None) -> Tensor:
    """The `threshold` argument that equals an epilogue of `packed_conv2d.packed`, bit for bit.

    With K = `products` (kh kw Cin / groups), the result is int32 of shape (2, Cout): for every dot
    product d in [-K, K], lo <= d <= hi exactly where the sign of
    ``clamp(d) * scale + bias + sign_shift`` is +1. A positive scale bounds d from below, a negative
    one from above; a constant sign gives (INT_MIN, INT_MAX) or the empty (INT_MAX, INT_MIN).

    The float32 epilogue itself is bisected, so its roundings, infinities and NaN (+1) carry over;
    each of its steps is monotonic in d, hence so is the sign. Larq Compute Engine computes the same
    bound in closed form, which differs where rounding moves it.

    scale, bias, sign_shift: real tensors of shape (Cout,), or None. out_channels is needed only
    where all three are None. Raises RuntimeError for wrong shapes or dtypes, and for a bound that
    is NaN.
    """
    op = "fold_threshold"
    try:
        products = integer(op, "products", products)
        if out_channels is not None:
            out_channels = integer(op, "out_channels", out_channels, 0)
        bounds = [None if bound is None else number(op, name, bound, finite=False)
                  for name, bound in (("clamp_min", clamp_min), ("clamp_max", clamp_max))]
    except ValueError as error:
        raise RuntimeError(f"bitkernels::{error}") from None
    clamp_min, clamp_max = bounds
    vectors = {"scale": scale, "bias": bias, "sign_shift": sign_shift}
    given = [t for t in vectors.values() if t is not None]
    if out_channels is None:
        if not given:
            fail(op, "out_channels", "given where scale, bias and sign_shift are not", None)
        out_channels = given[0].numel() if isinstance(given[0], Tensor) else 0
    for name, vector in vectors.items():
        if vector is not None and not isinstance(vector, Tensor):
            fail(op, name, "a tensor", type(vector).__name__)
        check_channel_vector(op, name, vector, out_channels)
    device = given[0].device if given else torch.device("cpu")

    def positive(dot: Tensor) -> Tensor:
        y = reference.epilogue(dot.int().unsqueeze(0), 1, clamp_min=clamp_min, clamp_max=clamp_max,
                               scale=scale, bias=bias)
        if sign_shift is not None:
            y = y + sign_shift.float()
        return ~(y < 0).squeeze(0)

    low = torch.full((out_channels,), -products, dtype=torch.int64, device=device)
    high = torch.full_like(low, products)
    first, last = positive(low), positive(high)
    # Invariant where the sign changes: it is `first` at low and `last` at high.
    for _ in range((2 * products).bit_length()):
        middle = (low + high) // 2
        below = positive(middle) == first
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    lo = torch.where(first, INT_MIN, torch.where(last, high, INT_MAX))
    hi = torch.where(last, INT_MAX, torch.where(first, low, INT_MIN))
    return torch.stack([lo, hi]).int()
