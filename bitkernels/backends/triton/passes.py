"""Tiles of the passes over activations: what only a GPU can decide, one row a pass.

`benchmarks/gpu/tune_passes.py` times candidates. The defaults follow from machine code for sm_90:
a thread loads 16 bytes at once and keeps at least four loads in flight, and the programs of a walk
fill 132 processors once with the registers that they take.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Pass(NamedTuple):
    """elements: of a tile. columns: its channels at most, where channels are contiguous in memory.
    programs: of a walk at most, over all blocks of channels; 0: one for each two tiles, or where
    there is no walk for each. steps: tiles of a walk whose sums are added in float32, where they
    are. stages: turns of a walk with sums whose loads are in flight, in shared memory but for 1."""

    elements: int
    columns: int = 256
    warps: int = 4
    programs: int = 0
    steps: int = 16
    stages: int = 1


PASSES = {
    "block_forward": Pass(1024, warps=8, programs=528),
    "norm_backward": Pass(1024, warps=8, programs=528),
    "rprelu": Pass(2048),
    "rsign": Pass(2048),
    "mask_grad": Pass(1024),
    "unpack": Pass(2048),
    "sign_pack": Pass(4096, warps=8),
    "block_backward": Pass(1024, programs=396, steps=64, stages=3),
    "sign_backward": Pass(elements=1024, columns=256, warps=4, programs=396, steps=64, stages=3),
    "rprelu_backward": Pass(elements=1024, columns=256, warps=8, programs=264, steps=64, stages=3),
    "moments": Pass(2048, programs=528),
    "max_pool2d": Pass(1024),  # 16 bytes a thread, of which it has as many as a window has taps
    "max_pool2d_backward": Pass(1024),
}


def tile(name: str, channel_stride: int, channels: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C), long along what is contiguous in memory."""
    return _tile(PASSES[name], channel_stride, channels)


def _tile(found: Pass, channel_stride: int, channels: int) -> tuple[int, int]:
    if channel_stride != 1:
        return found.elements // 8, 8
    columns = min(max(32, 1 << (channels - 1).bit_length()), found.columns)
    return found.elements // columns, columns


class Walk(NamedTuple):
    """Of the tiles of rows by channels: one row of partial sums a program."""

    block_r: int
    block_c: int
    tiles: int  # of rows
    programs: int  # for each block of channels
    blocks: int  # of channels
    wide: bool  # whether rows are counted in int64: the turn after the last one counts beyond


def walk(name: str, channel_stride: int, rows: int, channels: int, far: bool) -> Walk:
    """far: whether offsets are int64 anyway."""
    return _walk(PASSES[name], channel_stride, rows, channels, far)


@functools.lru_cache(4096)
def _walk(found: Pass, channel_stride: int, rows: int, channels: int, far: bool) -> Walk:
    (block_r, block_c), most = _tile(found, channel_stride, channels), found.programs
    tiles, blocks = -(-rows // block_r), -(-channels // block_c)
    programs = min(tiles, max(most // blocks, 1)) if most else -(-tiles // 2)
    wide = far or rows + 2 * programs * block_r >= 2**31
    return Walk(block_r, block_c, tiles, programs, blocks, wide)
