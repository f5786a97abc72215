"""Binary layers of a whole model to packed ones, for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from bitkernels.nn.layer import BinaryLayer


def pack(model: nn.Module, *,
         filter: Callable[[str, BinaryLayer], bool] | None = None) -> nn.Module:
    """A copy of a model for inference, with its binary layers packed to 1-bit weights.

    Every BinaryConv1d, BinaryConv2d and BinaryLinear becomes its inference twin (same outputs, no
    latent weights); all other modules are copied. The copy is in eval mode and none of its
    parameters requires grad. The model itself is not changed.

    filter: called with (name, layer) for each binary layer; one with a false answer is copied as it
      is. `lambda name, layer: layer.pack_obstacle() is None` packs what can be packed.

    Raises ValueError that names each binary layer which has no packed twin (three-dimensional, or
    with a quantizer that is not binary), with the reason.
    """
    binary = [(name, m) for name, m in model.named_modules() if isinstance(m, BinaryLayer)
              and (filter is None or filter(name, m))]
    obstacles = [f"{name or type(m).__name__}: {m.pack_obstacle()}" for name, m in binary
                 if m.pack_obstacle() is not None]
    if obstacles:
        raise ValueError("cannot pack " + "; ".join(obstacles))
    # The twins enter the copy in place of their layers, so latent weights are never copied.
    memo: dict[int, Any] = {id(layer): layer.pack() for _, layer in binary}
    packed: nn.Module = copy.deepcopy(model, memo)
    return packed.eval().requires_grad_(False)
