"""One process of many: the group, and batch norm over the joined batch.

Under `torchrun` each process computes its share of every batch; the gradients are averaged by
DistributedDataParallel. Rank 0 alone writes files.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Group", "SyncBatchNorm", "synchronised"]


class Group:
    """The processes of this run: those of `torchrun`, or this one alone.

    rank, size: this process and how many there are. `close` ends what `join` began.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def join(cls, device: str) -> Group:
        """The group that `torchrun` describes by its variables; "nccl" on GPUs, "gloo" else."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with averaged gradients."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """The sums over all processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def shared(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all processes' batches together, on any device.

    `torch.nn.SyncBatchNorm` is for GPUs only; this one is plain PyTorch with one all-reduce of
    count, sums and sums of squares in each direction. They are summed in float64, so that the
    statistics do not depend on how the batch is shared out. Parameters, buffers, momentum and
    evaluation are those of `torch.nn.BatchNorm2d`. Input (N, C, ...), N may differ among processes.

    Raises ValueError for training on a single value per channel, as torch's.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: expected (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias,
                                False, 0.0, self.eps)
        dims = [d for d in range(input.dim()) if d != 1]
        x = input if input.dtype == torch.float64 else input.float()
        count = x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        sums: Tensor = _AllReduce.apply(torch.cat([
            count, x.sum(dims, dtype=torch.float64), (x * x).sum(dims, dtype=torch.float64)]))
        count, (total, squares) = sums[0], sums[1:].chunk(2)
        if count <= 1:
            raise ValueError("SyncBatchNorm: more than one value per channel is needed to train")
        mean = total / count
        variance = (squares / count - mean * mean).clamp_min(0)
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), (variance * (count / (count - 1))).detach())
        factor = (variance + self.eps).rsqrt()
        if self.weight is not None:
            factor = factor * self.weight
        shift = -mean * factor
        if self.bias is not None:
            shift = shift + self.bias
        shape = [1, -1, *[1] * (input.dim() - 2)]
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


def synchronised(model: nn.Module, group: Group, device: torch.device) -> nn.Module:
    """The model with synchronised batch norms, which share its parameters and buffers.

    torch's own on GPUs, `SyncBatchNorm` elsewhere; with one process the model as it is.
    """
    if group.size == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                twin = SyncBatchNorm.__new__(SyncBatchNorm)
                twin.__dict__.update(child.__dict__)
                setattr(parent, name, twin)
    return model
