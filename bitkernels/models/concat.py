"""Dense networks, whose layers see all that was computed before them, without keeping it twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels._dispatch import FirstOrder, functional_transforms
from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.nn.hooks import is_patched

_norm = torch.ops.aten._batch_norm_with_update.default
_norm_backward = torch.ops.aten.batch_norm_backward.default
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ImageInput(FxLeaf):
    """Images (N, C, H, W) in channels-last order, so that concatenations copy whole pixels.

    Raises RuntimeError for a side below least_side; name: of the network, for the message.
    """

    def __init__(self, name: str, least_side: int = 1) -> None:
        super().__init__()
        self.name, self.least_side = name, least_side

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or min(input.shape[2:]) < self.least_side:
            raise RuntimeError(f"{self.name}: images must be (N, C, H, W) of at least "
                               f"{self.least_side} pixels on each side, got shape "
                               f"{tuple(input.shape)}")
        if not torch.compiler.is_compiling() and functional_transforms():
            return input  # vmap has no such order
        return input.contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        return f"least_side={self.least_side}"


class _ConcatNorm(FirstOrder):
    """Batch norm, by the batch's statistics, of a concatenation that the backward makes anew."""

    operator = "batch norm of a concatenation"

    @staticmethod
    def forward(ctx, weight, bias, running_mean, running_var, momentum, eps, *parts):
        out, mean, invstd, reserve = _norm(torch.cat(parts, 1), weight, bias, running_mean,
                                           running_var, momentum, eps)
        ctx.save_for_backward(weight, mean, invstd, reserve, *parts)
        # Not read, but by whether they are there the kernel is chosen; the next forward changes
        # them, so they are no saved tensors.
        ctx.running, ctx.eps = (running_mean, running_var), eps
        return out

    @staticmethod
    def backward(ctx, tensors, grad) -> Any:
        weight, mean, invstd, reserve, *parts = tensors
        grads = _norm_backward(grad, torch.cat(parts, 1), weight, *ctx.running, mean, invstd,
                               True, ctx.eps, [True] * 3, reserve)
        return *grads[1:], *(None,) * 4, *(
            g.to(part.dtype) for g, part in zip(grads[0].split([p.shape[1] for p in parts], 1),
                                                parts, strict=True))


def norm_of_concatenated(norm: nn.BatchNorm2d, parts: Sequence[Tensor]) -> Tensor:
    """norm(torch.cat(parts, 1)), with its gradients and running statistics.

    In training by plain calls autograd keeps the parts, which one another's layers keep too, and
    not the concatenation: what a dense section keeps then grows with its channels, and not with
    their square. The module itself is called where that does not apply: for one part, without
    gradients, in evaluation, with hooks, compiled, in `torch.func`, and for other norms.
    """
    if (len(parts) == 1 or not norm.training or not torch.is_grad_enabled()
            or type(norm) is not nn.BatchNorm2d or norm.running_mean is None
            or norm.running_var is None or norm.weight is None or norm.momentum is None
            or any(type(part) is not Tensor for part in parts)
            or torch.compiler.is_compiling() or torch.jit.is_tracing() or functional_transforms()
            or torch._C._len_torch_dispatch_stack() > 0
            or any(getattr(norm, hooks) for hooks in _HOOKS) or is_patched(norm)
            or any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS)
            or parts[0].numel() // max(parts[0].shape[1], 1) < 2):
        return norm(parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return _ConcatNorm.apply(norm.weight, norm.bias, norm.running_mean, norm.running_var,
                             norm.momentum, norm.eps, *parts)


class DenseSection(nn.Sequential):
    """Modules one after the other, of which those with `of_parts` add channels to their input.

    They are called with a list of what there is so far, to be concatenated, and what they return
    joins it; the others take and return the whole. Returns the whole, (N, C, H, W).
    """

    def forward(self, input: Tensor) -> Tensor:
        parts = [input]
        for module in self:
            if not getattr(module, "of_parts", False):
                parts = [module(_joined(parts))]
                continue
            parts.append(module(parts))
            if not self.training:  # nothing is to be kept: two parts are faster to join
                parts = [_joined(parts)]
        return _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
