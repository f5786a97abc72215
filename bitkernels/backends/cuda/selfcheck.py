"""Small cases of the operators of csrc/cuda, run by one kernel, compared with the reference.

The cases are those of the Triton kernels' check, as far as these kernels take them, and two that
fill several tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels.backends.cuda import kernels, launch
from bitkernels.backends.triton import selfcheck
from bitkernels.ops._record import OPERATORS


def cases(op: str) -> list[tuple[tuple, dict]]:
    found = []
    for args, kw in selfcheck.cases(op):
        if kw.get("pad_value") == 1:
            kw = dict(kw, pad_value=0)
        found.append((args, kw))
    v = selfcheck.Values()
    if op == "packed_linear":
        # Several tiles, turns of the ring and words; rows of 16 bytes.
        found.append(((v.words(300, 5120), v.words(200, 5120), 5120),
                      dict(real=False, packed=True)))
        found.append(((v.words(150, 384), v.words(70, 384), 384),
                      dict(real=True, packed=True, **v.epilogue((150, 70), 70))))
    return found


def failure(op: str, kernel: kernels.Kernel, device: torch.device) -> str | None:
    """What is wrong with this kernel on this device, or None."""

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    for number, (args, kw) in enumerate(cases(op)):
        if kernel not in launch.taking((kernel.family,), op, args, kw):
            continue
        expected = OPERATORS[op].reference(*args, **kw)
        got = getattr(launch, op)(kernel, *map(move, args),
                                  **{k: move(v) for k, v in kw.items()})
        for i, (want, have) in enumerate(zip(expected, got, strict=True)):
            if want is not None and not torch.equal(want, have.cpu()):
                return f"differs from the reference in case {number}, output {i}"
    return None
