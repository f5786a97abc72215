"""State dicts of other code, and of other versions of a network, brought to the names of ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bitkernels.nn import BinaryLayer

# A name of ours, and which half of its channels a tensor is: 0 all of it, 1 and 2 in that order.
Place = tuple[str, int]


def renamed(model: nn.Module, state: Mapping[str, Tensor],
            place: Callable[[str], Place | None]) -> dict[str, Tensor]:
    """The published state dict with the names and shapes of the model's own, see `placed`.

    Warns of binary weights that are exactly 0: the code of ReActNet and BNext computes with 0,
    ours with +1.
    """
    found = placed(state, model.state_dict(), place)
    weights = [found.get(f"{name}.weight") for name, layer in model.named_modules()
               if isinstance(layer, BinaryLayer)]
    zeros = sum(int((weight == 0).sum()) for weight in weights
                if weight is not None and not weight.is_meta)
    if zeros:
        warnings.warn(f"{type(model).__name__}: {zeros} of the binary weights are exactly 0, which "
                      "the published code takes as 0 and a bit as +1", stacklevel=3)
    return found


def placed(state: Mapping[str, Tensor], own: Mapping[str, Tensor],
           place: Callable[[str], Place | None]) -> dict[str, Tensor]:
    """A state dict with the names and shapes of `own`.

    place: what a name becomes; None leaves it as it is, for the caller to report. Vectors written
    as (1, C, 1, 1) and filters written as (N, 1) take the shape of ours. Halves are joined along
    dimension 0 where both are there, else left under their names, as is what comes second to a
    place.
    """
    found: dict[str, Tensor] = {}
    halves: dict[str, dict[int, str]] = {}
    for key, value in state.items():
        where = place(key)
        if where is None or where[0] not in own or where[0] in found:
            found[key] = value
        elif where[1]:
            halves.setdefault(where[0], {})[where[1]] = key
        else:
            found[where[0]] = _shaped(value, tuple(own[where[0]].shape))
    for name, keys in halves.items():
        if set(keys) != {1, 2} or name in found:
            found.update({key: state[key] for key in keys.values()})
            continue
        shape = tuple(own[name].shape)
        half = (shape[0] // 2, *shape[1:]) if shape else ()
        parts = [_shaped(state[keys[i]], half) for i in (1, 2)]
        # What has no channels is num_batches_tracked, the same in both.
        found[name] = torch.cat(parts) if shape else parts[0]
    return found


def _shaped(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = (value.dim() == 2 and value.shape[1] == 1
            or value.dim() == 4 and value.shape[0] == value.shape[2] == value.shape[3] == 1)
    return value.reshape(shape) if flat and value.numel() == math.prod(shape) else value
