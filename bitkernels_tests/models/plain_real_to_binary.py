"""The Real-to-Binary network in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from bitkernels_tests.models.plain import Layers


def real_to_binary(x: Tensor, w: Layers, halved: tuple[bool, ...]) -> Tensor:
    """halved: for each layer whether it halves the image."""
    x = w.max_pool(w.prelu(w.norm(w.conv(x, 2), 1e-3)), 3, 2)
    for halves in halved:
        normed = w.norm(x, 1e-3)
        gate = w.dense(w.dense(normed.mean((2, 3))).relu()).sigmoid()
        y = w.binary_conv(normed, 2 if halves else 1) * gate[:, :, None, None]
        if halves:
            x = w.conv(w.mean_pool(x))
        y = w.prelu(y)
        x = y + (w.norm(x, 1e-3) if halves else x)
    return w.dense(x.mean((2, 3)))
