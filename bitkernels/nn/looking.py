"""What may be looked at: values of tensors, where nothing but a plain call runs the code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FEW = 16  # values that may have one sign by chance


def can_look_at(x: Tensor) -> bool:
    """Not while a compiler, tracer, transform or CUDA graph runs the code, or without values. What
    no operator takes is left to its error."""
    return (type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
            and not x.is_meta and x.is_floating_point() and x.layout == torch.strided
            and not x.is_nested and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._len_torch_dispatch_stack() == 0 and not torch.jit.is_tracing()
            and not (x.is_cuda and torch.cuda.is_current_stream_capturing()))


@dataclass
class Looked:
    """What a layer has looked at already, for warnings that come once."""

    input: bool = False
    weight: bool = False
    mask: int | None = None  # id of the pruning mask of the weight assigned last

    def assign(self, weight: Any, mask: Tensor | None) -> None:
        """A new weight is not looked at yet. Pruning hooks assign one at every call."""
        seen = None if mask is None else id(mask)
        if isinstance(weight, torch.nn.Parameter) or seen != self.mask:
            self.mask, self.weight = seen, False


def single_sign(x: Tensor) -> str | None:
    """"+1" or "-1" if all values have that sign and are not few, else None."""
    if x.numel() < _FEW:
        return None
    negative = x.detach() < 0
    if not negative.any():
        return "+1"
    return "-1" if negative.all() else None
