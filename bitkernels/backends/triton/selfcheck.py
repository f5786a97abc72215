"""Samples of an operator's record, run on the device and compared bit for bit with its reference.

The products run all cases in the configuration that runs where nothing is tuned, and the last one
in every other that may run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.backends.triton import configs
from bitkernels.ops._record import OPERATORS, Call
from bitkernels.ops._samples import Values as Values  # which csrc/cuda adds cases by


def cases(op: str) -> list[Call]:
    return OPERATORS[op].cases()


def _equal(want: Tensor, have: Tensor, args: tuple) -> bool:
    """Bit for bit, but for swish_sign, whose exponentials differ from library to library."""
    if "swish_sign" in [arg for arg in args if isinstance(arg, str)]:
        return torch.allclose(want, have, rtol=1e-5, atol=1e-4)
    return torch.equal(want, have)


def difference(want: Tensor, have: Tensor) -> str:
    """Where two unequal tensors differ."""
    if want.shape != have.shape or want.dtype != have.dtype:
        return (f"{want.dtype} of shape {tuple(want.shape)} wanted, "
                f"got {have.dtype} of shape {tuple(have.shape)}")
    where = (want != have).nonzero()  # a NaN differs from itself
    at = tuple(where[0].tolist())
    return (f"{len(where)} of {want.numel()} values, first at {at}: "
            f"{want[at].item()!r} wanted, got {have[at].item()!r}")


def failure(op: str, inner: str | None, device: torch.device) -> str | None:
    """What is wrong with this operator's kernel on this device, or None."""
    from bitkernels.backends.triton import tuning
    from bitkernels.backends.triton.dispatch import kernel

    forced = {} if inner is None else {"inner": inner}
    tiles, usual = 1, 0
    if inner is not None and (inner == "b1" or configs.tunes()):
        family = configs.family(device)
        tiles = len(configs.table(inner, family))
        usual = tiles - 1 if inner == "b1" and family in configs.SMALLEST else 0

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    every = cases(op)
    for tile in range(tiles):
        for number, (args, kw) in enumerate(every):
            if tile != usual and number + 1 < len(every):
                continue
            expected = OPERATORS[op].reference(*args, **kw)
            given, named = [*map(move, args)], {k: move(t) for k, t in kw.items()}
            with tuning.fixed(tile):
                kernel(op)(*given, **named, **forced)
                got = kernel(op)(*given, **named, **forced)  # as all later ones: see launch.py
            if isinstance(expected, Tensor):
                expected, got = (expected,), (got,)
            for i, (want, have) in enumerate(zip(expected, got, strict=True)):
                if want is not None and not _equal(want, have.cpu(), args):
                    return (f"differs from the reference in case {number}, output {i}, "
                            f"configuration {tile}: {difference(want, have.cpu())}")
    return None
