"""Packed signs and bounds, and the state that all metrics save and load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_sign_pack = torch.ops.bitkernels.sign_pack.default
_sign_pack_mask = torch.ops.bitkernels.sign_pack_mask.default
NAN = float("nan")


def packed_signs(x: Tensor) -> Tensor:
    """The signs of x, packed (ceil(numel / 32),)."""
    flat = x.detach().reshape(-1)
    return _sign_pack(flat) if flat.numel() else flat.new_empty(0, dtype=torch.int32)


def packed_within(x: Tensor, bound: float) -> Tensor:
    """|x| <= bound, packed (ceil(numel / 32),); NaN is not within."""
    flat = x.detach().reshape(-1)
    return _sign_pack_mask(flat, bound)[1] if flat.numel() else packed_signs(flat)


def popcount(words: Tensor) -> Tensor:
    """Number of set bits, an int64 scalar on the words' device."""
    v = words.contiguous().view(torch.uint8)  # bytes: logical shifts, sums that cannot overflow
    v = v - ((v >> 1) & 0x55)
    v = (v & 0x33) + ((v >> 2) & 0x33)
    return ((v + (v >> 4)) & 0x0F).sum(dtype=torch.int64)


def accumulate(total: Tensor | int, part: Tensor) -> Tensor:
    """total + part on the part's device; a total that was loaded may be on another one."""
    return part + total.to(part.device) if isinstance(total, Tensor) else part + total


class Metric:
    """State by name, and its way to and from a checkpoint."""

    _state: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises KeyError where something is missing."""
        values = {name: state[name] for name in self._state}
        for name, value in values.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
