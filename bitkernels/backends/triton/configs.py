"""Which GPU this is, what the environment asks for, and the tile sizes each GPU family gets.

Environment, read at call time:
  BITKERNELS_TRITON            0: the reference runs instead of every Triton kernel
  BITKERNELS_TRITON_INNER      popc, int8 or b1: forces the inner product where it applies
  BITKERNELS_TRITON_AUTOTUNE   0: fixed tiles; else the shipped tiles are timed once a shape class

The tiles were chosen from register and spill counts of ahead-of-time compiles. The autotuner timed
them on an H200 (2026-11-26: 0.51 to 0.96 of cuDNN's bf16 speed with fp16 in and out, see
docs/performance.md); no other GPU has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from bitkernels.backends import gpus

INNER = ("b1", "int8", "popc")


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def enabled() -> bool:
    return os.environ.get("BITKERNELS_TRITON", "1") != "0"


def autotuning() -> bool:
    return os.environ.get("BITKERNELS_TRITON_AUTOTUNE", "1") != "0"


def forced_inner() -> str | None:
    forced = os.environ.get("BITKERNELS_TRITON_INNER")
    if forced and forced not in INNER:
        raise RuntimeError(f"BITKERNELS_TRITON_INNER must be one of {', '.join(INNER)}, "
                           f"got {forced!r}")
    return forced or None


def family(device: torch.device) -> str:
    """sm80, sm86, sm89, sm90, sm100, sm120, ..., hip, old (before sm_80) or interpret."""
    gpu = gpus.of(device)
    if gpu is None:
        return "interpret"
    if gpu.capability is None:
        return "hip"
    major, minor = gpu.capability
    if major < 8:
        return "old"
    return f"sm{major}{minor}" if major < 9 else f"sm{major}0"


def has_b1(family: str) -> bool:
    """Native b1 mma.sync with `and`: sm_80 to sm_90. Later GPUs only emulate it, by int8."""
    return family in ("sm80", "sm86", "sm87", "sm89", "sm90")


def inline_ptx(family: str) -> bool:
    return family.startswith("sm")


@dataclass(frozen=True)
class Tile:
    """A kernel's configuration: its tile's constants by name, warps, pipeline stages."""

    tile: dict[str, int]
    warps: int
    stages: int = 1


def _int8(rows: int, columns: int, warps: int, stages: int = 3) -> Tile:
    return Tile({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 32}, warps, stages)


def _popc(rows: int, columns: int, warps: int) -> Tile:
    return Tile({"BLOCK_M": rows, "BLOCK_N": columns}, warps)


# The first is the fixed configuration. BLOCK_K of int8 is in bytes, of 8 channels each. Every
# BLOCK_N of int8 and b1 divides COLUMNS, so that no tile of whole groups spans two of them.
COLUMNS = 64
_INT8 = (_int8(128, 64, 4), _int8(256, 64, 8), _int8(64, 64, 4))
INT8 = {
    "sm80": _INT8,
    "sm90": _INT8,
    "sm100": _INT8,
    "sm120": _INT8,
    "hip": (_int8(128, 64, 4, 2), _int8(64, 64, 4, 2)),
    "interpret": (_int8(64, 64, 4, 1),),
}
POPC = {
    "default": (_popc(32, 32, 4), _popc(64, 32, 4), _popc(16, 32, 2)),
    "interpret": (_popc(64, 64, 4),),
}


def _b1(slots: int, warps: int) -> Tile:
    return Tile({"SLOTS": slots, "BLOCK_M": 8 * slots * warps}, warps)


# A warp owns 8 SLOTS x 64 outputs, warps are stacked along M.
B1 = (_b1(4, 4), _b1(8, 4), _b1(4, 2))


def load_words(depth: int) -> int:
    """Words that a thread of the 1-bit kernel loads at once, of pixels of so many words."""
    return 4 if depth % 16 == 0 else 2 if depth % 2 == 0 else 1


def table(inner: str, family: str) -> tuple[Tile, ...]:
    """The shipped configurations of an inner product, the fixed one first."""
    if inner == "b1":
        return B1[:1] if family == "interpret" else B1
    if inner == "popc":
        return POPC.get(family, POPC["default"])
    if family not in INT8:
        family = "sm80" if family.startswith("sm8") else "sm120"
    return INT8[family]
