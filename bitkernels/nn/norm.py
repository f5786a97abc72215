"""Batch norm over the joined batch of all processes, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bitkernels._arguments import flag, integer, number, real_dtype


def _alone() -> bool:
    return not dist.is_available() or not dist.is_initialized()


class _AllReduce(torch.autograd.Function):
    """The sum over the processes of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values, group):
        ctx.group, values = group, values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SyncBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all processes' batches together, on any device.

    `torch.nn.SyncBatchNorm` is for GPUs only, and DistributedDataParallel refuses it on CPUs; this
    one is plain PyTorch. In a `BinaryResidualBlock` it is part of the fused operator. Parameters,
    buffers, momentum and evaluation are those of `torch.nn.BatchNorm2d`. Input (N, C, ...); N may
    differ among processes and be 0. Without a process group it is an ordinary batch norm.

    process_group: whose processes take part; None for all. The other arguments are those of
      `torch.nn.BatchNorm2d`.

    Two all-reduces of a few numbers a channel: the mean, then sums and sums of squares of the
    distances from it, all in float64. So a mean that is large against the deviation cancels
    nothing, and the statistics do not depend on how the batch is shared out.

    Raises ValueError for training on a single value per channel, as torch's, and for arguments that
    are none.
    """

    process_group: Any = None  # of pickled ones that are older than it

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
                 affine: bool = True, track_running_stats: bool = True, device=None, dtype=None, *,
                 process_group: Any = None, **options: Any) -> None:
        where = "SyncBatchNorm"
        super().__init__(
            integer(where, "num_features", num_features, 0), number(where, "eps", eps, 0),
            None if momentum is None else number(where, "momentum", momentum, 0, 1),
            flag(where, "affine", affine), flag(where, "track_running_stats", track_running_stats),
            device, real_dtype(where, dtype), **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: expected (N, C, ...), got {tuple(input.shape)}")

    def _total(self, values: Tensor) -> Tensor:
        return values if _alone() else _AllReduce.apply(values, self.process_group)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias,
                                False, 0.0, self.eps)
        dims, wide = [d for d in range(input.dim()) if d != 1], torch.float64
        shape = [1, -1, *[1] * (input.dim() - 2)]
        x = input if input.dtype == wide else input.float()
        own = x.numel() / x.shape[1]
        count, total = self._total(torch.cat([
            x.new_tensor([own], dtype=wide), x.detach().sum(dims, dtype=wide)])).split(
            [1, x.shape[1]])
        if (own if _alone() else count) <= 1:  # a number where it is known, for compilers
            raise ValueError("SyncBatchNorm: more than one value per channel is needed to train")
        pivot = (total / count).to(x.dtype)
        x = x - pivot.view(shape)
        sums = self._total(torch.cat([x.sum(dims, dtype=wide), (x * x).sum(dims, dtype=wide)]))
        offset, squares = (sums / count).chunk(2)  # the mean's distance from its rounding, pivot
        variance = squares - offset * offset
        if self.training and self.running_mean is not None:
            self._track((pivot + offset).detach(), (variance * (count / (count - 1))).detach())
        factor = (variance + self.eps).rsqrt()
        if self.weight is not None:
            factor = factor * self.weight
        shift = -offset * factor
        if self.bias is not None:
            shift = shift + self.bias
        y = x * factor.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = (1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum)
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(now.to(running.dtype), rate)
