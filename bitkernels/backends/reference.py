"""Registers the reference implementation for every device that has nothing faster."""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import _checks, reference
from bitkernels._ops import LIB
from bitkernels.backends import cpu
from bitkernels.backends.answer import Answer
from bitkernels.backends.launchers import register, register_block

KEY = "CompositeExplicitAutograd"  # every device without a kernel of its own


def run(op: str, *args, **kw):
    """The result in the layout that the fake kernels promise."""
    if args[0].device.type == "cpu":
        cpu.warn_slow()
    out = getattr(reference, op)(*args, **kw)
    if op == "mask_grad":
        return _like(args[0], args[2], out)
    if op in ("rsign", "rprelu"):
        return _like(args[0], 1, out)
    if op in ("rprelu_backward", "sign_backward"):
        return _like(args[1], 1, out[0]), *out[1:]
    return out


def explain(op: str, *args, **kw) -> Answer:
    """What a call runs that no other backend takes."""
    return Answer("reference", "PyTorch", "plain PyTorch, slow")


def _like(t: Tensor, dim: int, result: Tensor) -> Tensor:
    """The result in the memory layout that the fake kernels promise."""
    return _checks.empty_around(t, dim).copy_(result)


def tile_weight(weight_words, groups=1):
    _checks.check_tile_weight(weight_words, groups)
    return reference.tile_weight(weight_words, groups)


def binary_conv2d_forward(input, weight, bias, scale, stride, padding, dilation, groups, pad_value,
                          clip, dtype, channels_last):
    """By the packed operators, whatever backend they have on the device."""
    ops = torch.ops.bitkernels
    if clip is None:
        words, mask = ops.sign_pack(input, None, 1), input.new_empty(0, dtype=torch.int32)
    else:
        words, mask = ops.sign_pack_mask(input, clip, None, 1)
    out = ops.packed_conv2d(
        words, ops.sign_pack(weight, None, 1), input.shape[1], stride, padding, dilation, groups,
        pad_value=pad_value, scale=scale, bias=bias, dtype=dtype, channels_last=channels_last)
    return out, words, mask


register(KEY, run)
register_block(KEY, run)
LIB.impl("tile_weight", tile_weight, KEY)
LIB.impl("binary_conv2d_forward", binary_conv2d_forward, KEY)
