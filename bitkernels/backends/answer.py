"""What a backend says of a call: whether it takes it, in which kernel, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def registered(operator: str, key: str) -> bool:
    """Whether an operator (with its overload, if not the default) has a kernel of its own under a
    dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitkernels::{operator}", key)


@dataclass(frozen=True)
class Answer:
    """Of one backend, about one call. `str()` is one line.

    backend: "reference", "cpu", "triton" or "cuda".
    kernel: what runs, as "avx2", "b1" or "resident_64x64"; None where this backend does not take
      the call and the next one gets it.
    reason: why, in words.
    trust: "checked", "not checked yet", or what is wrong with kernels that are preferred and no
      longer run; "" where kernels do not prove themselves on the device (`backends/trust.py`).
    """

    backend: str
    kernel: str | None
    reason: str
    trust: str = ""

    def __str__(self) -> str:
        if self.kernel is None:
            return f"the next backend: {self.reason}"
        return f"{self.backend}: {self.kernel}, {self.reason}"
