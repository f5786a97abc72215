"""Views of a tensor as rows by channels, and what the elementwise launchers share.

A tensor and its channel dimension become (outer, inner, channels) with one stride each, so that
NCHW memory, channels-last memory and plain matrices run in the same kernel without a copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _is_rows(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def collapse(dim: int, *tensors: Tensor) -> tuple[int, int, list[tuple[int, ...]]] | None:
    """(outer, inner, [(outer stride, inner stride, channel stride) of each]) or None.

    Rows are the sizes without `dim`, in order; outer * inner of them. None if the tensors' strides
    need more than two row dimensions. Without elements there are no rows: to PyTorch such a tensor
    is contiguous whatever its strides, so these would be the same in a copy.
    """
    if not tensors[0].numel():
        return 1, 0, [(0, 0, 0)] * len(tensors)
    if dim == 1 and all(_is_rows(t) for t in tensors):  # as below, in a tenth of the time
        images, channels, height, width = tensors[0].shape
        return 1, images * height * width, [(0, channels, 1)] * len(tensors)
    rest = [d for d in range(tensors[0].dim()) if d != dim and tensors[0].shape[d] != 1]
    groups: list[list[int]] = []  # runs of dimensions that every tensor walks with one stride
    for d in rest:
        if groups and all(
            t.stride(groups[-1][-1]) == t.stride(d) * t.shape[d] for t in tensors
        ):
            groups[-1].append(d)
        else:
            groups.append([d])
    if len(groups) > 2:
        return None
    sizes = [math.prod(tensors[0].shape[d] for d in g) for g in groups]
    sizes = [1] * (2 - len(sizes)) + sizes
    strides = []
    for t in tensors:
        s = [t.stride(g[-1]) for g in groups]
        strides.append((*[0] * (2 - len(s)), *s, t.stride(dim)))
    return sizes[0], sizes[1], strides


def together(dim: int, out: Tensor, *tensors: Tensor
             ) -> tuple[tuple[Tensor, ...], int, int, list[tuple[int, ...]]]:
    """(tensors, outer, inner, strides of each and of `out`): `collapse`, of copies in the order of
    `out` where the tensors need more than two row dimensions. `out` is of `empty_around`.
    """
    found = collapse(dim, *tensors, out)
    if found is None:
        tensors = tuple(torch.empty_like(out, dtype=t.dtype).copy_(t) for t in tensors)
        found = collapse(dim, *tensors, out)
        assert found is not None
    return tensors, *found


def as_bytes(words: Tensor) -> Tensor:
    """Words, dense in memory, as bytes, the last dimension four times as long."""
    words = words.contiguous()
    if words.stride(-1) != 1:  # of one word a row, or of no elements: it still counts as contiguous
        words = words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.int8)


def wide(*tensors: Tensor | None) -> bool:
    """Whether an element of some tensor lies 2^31 or more elements from its first."""
    for t in tensors:
        if t is None or (t.numel() < 2**30 and (  # most, and soon known
                t.is_contiguous() or _is_rows(t))):
            continue
        if sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 2**14 >= 2**31:
            return True
    return False
