"""Small cases of the operators of csrc/cuda, run by one kernel, compared with the reference.

The cases are those of the Triton kernels' check, as far as these kernels take them, two that fill
several tiles, and for kernels whose tiles wait for each other one that fills the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.backends.cuda import kernels, launch, settled
from bitkernels.backends.triton import selfcheck
from bitkernels.ops._record import OPERATORS


def cases(op: str) -> list[tuple[tuple, dict]]:
    found = []
    for args, kw in selfcheck.cases(op):
        if kw.get("pad_value") == 1:
            kw = dict(kw, pad_value=0)
        found.append((args, kw))
    v = selfcheck.Values()
    if op.startswith("packed_conv2d"):
        # Tiles that touch several images, more filters than a block has, whole words of both.
        args = v.words(5, 7, 6, 256), v.words(160, 3, 3, 256), 256, (1, 1), (1, 1), (1, 1), 1
        found.append((args, dict(found[-1][1])))
    if op == "packed_linear":
        # Several tiles, turns of the ring and words; rows of 16 bytes.
        found.append(((v.words(300, 5120), v.words(200, 5120), 5120),
                      dict(real=False, packed=True)))
        found.append(((v.words(150, 384), v.words(70, 384), 384),
                      dict(real=True, packed=True, **v.epilogue((150, 70), 70))))
    return found


def many_rows(kernel: kernels.Kernel, device: torch.device) -> int:
    """That give each block, of which half have other columns, more tiles than it has places for,
    and some one more."""
    each = 2 * kernel.groups or 3
    return (each * launch.multiprocessors(device) // 2 + 1) * kernel.bm - 5


def many_tiles(kernel: kernels.Kernel, device: torch.device) -> tuple[tuple, dict, Tensor]:
    """A packed_linear of `many_rows`, and its signs.

    64 rows, of which the others are copies, so that the reference has little to do.
    """
    v = selfcheck.Values()
    columns, channels = 2 * kernel.bn - 30, 1408
    rows = many_rows(kernel, device)
    few, filters = v.words(64, channels), v.words(columns, channels)
    low = torch.arange(columns, dtype=torch.int32) % 61 - 30
    high = low + torch.where(low % 3 == 0, 20, 2**31 - 100).to(torch.int32)
    low[::7] = -2**31
    kw = dict(threshold=torch.stack([low, high]), real=False, packed=True)
    signs = OPERATORS["packed_linear"].reference(few, filters, channels, **kw)[1]
    assert signs is not None
    which = torch.arange(rows) * 37 % 64
    return (few[which], filters, channels), kw, signs[which]


def many_images(op: str, kernel: kernels.Kernel, device: torch.device
                ) -> tuple[tuple, dict, list[Tensor]]:
    """A convolution of `many_rows`, and what it returns: dot products, and their moments. Copies of
    three images."""
    v = selfcheck.Values()
    few, filters = v.words(3, 7, 6, 256), v.words(2 * kernel.bn - 30, 3, 3, 256)
    rest = filters, 256, (1, 1), (1, 1), (1, 1), 1
    which = torch.arange(-(-many_rows(kernel, device) // 42)) % 3
    dot = OPERATORS["packed_conv2d"].reference(few, *rest, dtype=torch.int32)[0][which]
    args, d = (few[which], *rest), dot.long()
    if op == "packed_conv2d":
        return args, dict(dtype=torch.int32), [dot]
    kw = dict(pad_value=0, out_channels=None, relu=False, dtype=torch.int16)
    return args, kw, [dot.to(torch.int16), torch.stack([
        t.sum((0, 2, 3)) for t in (d, d * d, torch.ones_like(d))])]


def failure(op: str, kernel: kernels.Kernel, device: torch.device) -> str | None:
    """What is wrong with this kernel on this device, or None."""

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    for number, (args, kw) in enumerate(cases(op)):
        if kernel not in launch.taking((kernel.family,), op, args, kw):
            continue
        expected = OPERATORS[op].reference(*args, **kw)
        given, named = [*map(move, args)], {k: move(v) for k, v in kw.items()}
        # The second time as of filters that have been read, which a convolution copies earlier.
        for early in (False, True) if op == "packed_conv2d" and kernel.resident else (False,):
            with settled.answering(early):
                got = getattr(launch, op)(kernel, *given, **named)
            for i, (want, have) in enumerate(zip(expected, got, strict=True)):
                if want is not None and not torch.equal(want, have.cpu()):
                    return (f"differs from the reference in case {number}, output {i}"
                            f"{', with filters read before' if early else ''}: "
                            f"{selfcheck.difference(want, have.cpu())}")
    if op == "packed_linear" and (kernel.windows or kernel.measured_only):
        args, kw, want = many_tiles(kernel, device)
        _, have = launch.packed_linear(kernel, *map(move, args),
                                       **{k: move(v) for k, v in kw.items()})
        if not torch.equal(want, have.cpu()):
            return "differs from the reference over many tiles"
    if op != "packed_linear" and kernel.measured_only:
        args, kw, wanted = many_images(op, kernel, device)
        if kernel in launch.taking((kernel.family,), op, args, kw):
            got = getattr(launch, op)(kernel, *map(move, args), **kw)
            for want, have in zip(wanted, got, strict=False):
                if not torch.equal(want, have.cpu()):
                    return "differs from the reference over many images"
    return None
