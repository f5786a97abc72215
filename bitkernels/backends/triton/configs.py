"""Which GPU this is, what the environment asks for, and the tile sizes each GPU family gets.

Environment, read at call time:
  BITKERNELS_TRITON            0: the reference runs instead of every Triton kernel
  BITKERNELS_TRITON_INNER      popc, int8 or b1: forces the inner product where it applies
  BITKERNELS_TRITON_AUTOTUNE   1: the shipped tiles are timed once a shape class; 0: nothing is
                               timed; unset: large calls are tuned, others run in one tile

One tile is one kernel to compile. Which one that is: the entry of MEASURED, else on the families of
SMALLEST the smallest, on others the largest that gives every multiprocessor of a large GPU two
programs, else the smallest.

The tiles were chosen from register and spill counts of ahead-of-time compiles. Those of the 1-bit
kernel were timed on an H200 (benchmarks/gpu/check.py; others by benchmarks/gpu/tune_triton.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bitkernels.backends import gpus

INNER = ("b1", "int8", "popc")


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def enabled() -> bool:
    # Asked in every call; a name that is not there costs a third of what `get` does.
    return "BITKERNELS_TRITON" not in os.environ or os.environ["BITKERNELS_TRITON"] != "0"


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


class Size(NamedTuple):
    """Of a contraction: output pixels and channels, taps, words of a pixel (of its group); what is
    written, `block` if it adds a residual, else `real` or `packed`; flat: of a linear layer."""

    rows: int
    columns: int
    taps: int
    words: int
    writes: str = "real"
    flat: bool = False


LARGE = 1 << 31  # pairs of words, as a product of 4096 x 4096 x 4096 has: tuning pays


def tunes(size: Size | None = None) -> bool:
    """Whether tiles are timed: in a call of this size, or in some call."""
    asked = os.environ.get("BITKERNELS_TRITON_AUTOTUNE")
    if asked is None and size is not None:
        return size.rows * size.columns * size.taps * size.words >= LARGE
    return asked != "0"


@dataclass(frozen=True)
class Tile:
    """A kernel's configuration: its tile's constants by name, warps, pipeline stages, and the
    registers that a thread may have, if bounded."""

    tile: dict[str, int]
    warps: int
    stages: int = 1
    registers: int | None = None

    def __hash__(self) -> int:
        return hash((*self.tile.items(), self.warps, self.stages, self.registers))

    def __str__(self) -> str:
        return f"{self.tile['BLOCK_M']}x{self.tile.get('BLOCK_N', COLUMNS)}"


def _int8(rows: int, columns: int, warps: int, stages: int = 3) -> Tile:
    return Tile({"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": 32}, warps, stages)


def _popc(rows: int, columns: int, warps: int) -> Tile:
    return Tile({"BLOCK_M": rows, "BLOCK_N": columns}, warps)


# Of int8 and popc the first is the fixed configuration. BLOCK_K of int8 is in bytes, of 8 channels
# each. Every BLOCK_N of int8 and b1 divides COLUMNS, so that no tile of whole groups spans two.
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


def b1(slots: int, warps: int, lines: int = 0, registers: int | None = None) -> Tile:
    """A warp owns 8 SLOTS x 64 outputs, warps are stacked along M. 8 slots only without taps.
    lines: a loop over the lines of a filter, where their words allow, instead of no loop."""
    tile = {"SLOTS": slots, "BLOCK_M": 8 * slots * warps, "LINES": lines}
    return Tile(tile, warps, registers=registers)


B1 = (b1(4, 4), b1(4, 2), b1(4, 1))
B1_FLAT = (b1(8, 4), b1(4, 4), b1(4, 2))

# The fastest tile of the 1-bit kernel where a GPU has measured it: to be edited by hand, one of
# B1 or B1_FLAT. (family, output channels, taps, words of a pixel, what is written)
MEASURED: dict[tuple[str, int, int, int, str], Tile] = {}


def load_words(depth: int) -> int:
    """Words that a thread of the 1-bit kernel loads at once, of pixels of so many words."""
    return 4 if depth % 16 == 0 else 2 if depth % 2 == 0 else 1


def table(inner: str, family: str, flat: bool = False) -> tuple[Tile, ...]:
    """The shipped configurations of an inner product."""
    if inner == "b1":
        tiles = B1_FLAT if flat else B1
        return tiles[:1] if family == "interpret" else tiles
    if inner == "popc":
        return POPC.get(family, POPC["default"])
    if family not in INT8:
        family = "sm80" if family.startswith("sm8") else "sm120"
    return INT8[family]


# Where all tiles of the 1-bit kernel were timed and the smallest is behind the best by 1 % in the
# mean, 11 % at most: on an H200 (2026-11-27), 60 convolutions at batches of 1, 64 and 256. The rule
# for other families is behind by 2 % there, and by 14 to 39 % in square matrices of 4096 to 16384.
SMALLEST = ("sm90",)
PROGRAMS = 264  # two for each multiprocessor of an H200


def fixed_tile(inner: str, family: str, size: Size) -> Tile:
    """What runs where nothing is timed."""
    tiles = table(inner, family, size.flat)
    if inner != "b1":
        return tiles[0]
    measured = MEASURED.get((family, size.columns, size.taps, size.words, size.writes))
    if measured in tiles:
        return measured
    if family in SMALLEST:
        return tiles[-1]
    columns = -(-size.columns // COLUMNS)
    return next((tile for tile in tiles
                 if -(-size.rows // tile.tile["BLOCK_M"]) * columns >= PROGRAMS), tiles[-1])
