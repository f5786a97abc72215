"""State dicts of other code, and of other versions of a network, brought to the names of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# A name of ours, and which half of its channels a tensor is: 0 all of it, 1 and 2 in that order.
Place = tuple[str, int]


def placed(state: Mapping[str, Tensor], own: Mapping[str, Tensor],
           place: Callable[[str], Place | None]) -> dict[str, Tensor]:
    """A state dict with the names and shapes of `own`.

    place: what a name becomes; None leaves it as it is, for the caller to report. Vectors written
    as (1, C, 1, 1) and filters written as (N, 1) take the shape of ours. Halves are joined along
    dimension 0 where both are there, else left under their names.
    """
    found: dict[str, Tensor] = {}
    halves: dict[str, dict[int, str]] = {}
    for key, value in state.items():
        where = place(key)
        if where is None or where[0] not in own:
            found[key] = value
        elif where[1]:
            halves.setdefault(where[0], {})[where[1]] = key
        else:
            found[where[0]] = _shaped(value, tuple(own[where[0]].shape))
    for name, keys in halves.items():
        if set(keys) != {1, 2}:
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
    return value.reshape(shape) if flat and value.numel() == shape_size(shape) else value


def shape_size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
