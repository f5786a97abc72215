"""One process of many: the group, and batch norm over the joined batch.

Under `torchrun` each process computes its share of every batch; the gradients are averaged by
DistributedDataParallel. Rank 0 alone writes files.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from bitkernels.nn.norm import SyncBatchNorm

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
