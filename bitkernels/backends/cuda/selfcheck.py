"""Small cases of packed_conv2d and packed_linear, run by one kernel, compared with the reference.

The cases and their values are those of the Triton kernels' check, where these kernels take them,
and one more that fills several tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels import reference
from bitkernels.backends.cuda import kernels, launch
from bitkernels.backends.triton import selfcheck


def cases(op: str) -> list[tuple[tuple, dict]]:
    found = []
    for args, kw in selfcheck.cases(op):
        if kw.get("pad_value") == 1:
            kw = dict(kw, pad_value=0)
        found.append((args, kw))
    values = selfcheck.Values()
    if op == "packed_linear":  # several tiles and several turns of the ring
        found.append(((values.words(300, 5000), values.words(200, 5000), 5000),
                      dict(real=False, packed=True)))
    return found


def failure(op: str, kernel: kernels.Kernel, device: torch.device) -> str | None:
    """What is wrong with this kernel on this device, or None."""

    def move(value):
        return value.to(device) if isinstance(value, Tensor) else value

    for number, (args, kw) in enumerate(cases(op)):
        expected = getattr(reference, op)(*args, **kw)
        got = getattr(launch, op)(kernel, *map(move, args),
                                  **{k: move(v) for k, v in kw.items()})
        for i, (want, have) in enumerate(zip(expected, got, strict=True)):
            if want is not None and not torch.equal(want, have.cpu()):
                return f"differs from the reference in case {number}, output {i}"
    return None
