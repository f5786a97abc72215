"""`BinaryResidualBlock` in two processes: sync batch norm and gradients of the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn

from bitkernels import nn as bnn
from bitkernels_tests import forked
from bitkernels_tests.cases import reals

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(not distributed.is_available(), reason="no torch.distributed")]
STEPS, SIZES = 4, (5, 3)  # images of the first and of the second process


def network(norm) -> nn.Sequential:
    torch.manual_seed(7)

    def conv(cin, cout, stride=1):
        return bnn.BinaryConv2d(cin, cout, 3, stride, 1, bias=False, input_quantizer=None,
                                weight_scale="detached")

    shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(33, 48, 1, bias=False))
    return nn.Sequential(
        bnn.BinaryResidualBlock(conv(33, 33), norm(33), sign=bnn.RSign(33), act=bnn.RPReLU(33)),
        bnn.BinaryResidualBlock(conv(33, 48, 2), norm(48), sign=bnn.RSign(33), act=bnn.RPReLU(48),
                                shortcut=shortcut),
        bnn.BinaryResidualBlock(bnn.BinaryConv2d(48, 48, 3, 1, 1, bias=False),
                                norm(48, momentum=None), relu=True))


def batches() -> list[torch.Tensor]:
    torch.manual_seed(11)
    return [reals(sum(SIZES), 33, 6, 6) for _ in range(STEPS)]


def loss(y: torch.Tensor) -> torch.Tensor:
    return (y * y.detach().roll(1, 1).cos()).sum() / sum(SIZES)


def train(model: nn.Module, inputs, factor: float = 1.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for x in inputs:
        optimizer.zero_grad()
        (factor * loss(model(x))).backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                   world_size=2)
    # DistributedDataParallel refuses SyncBatchNorm on CPUs when it is built, not afterwards.
    parallel = nn.parallel.DistributedDataParallel(network(nn.BatchNorm2d))
    model: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(parallel.module)
    assert all(b.unfused(torch.zeros(3, b.conv.in_channels, 6, 6)) is None and b._group()
               for b in model)
    # It averages gradients over the processes, and the loss is a sum over images: times 2.
    train(parallel, [x.split(SIZES)[rank] for x in batches()], 2.0)
    # One process without an image, or with one value per channel, still takes part.
    for size in ((0, 2), (1, 2)):
        with torch.no_grad():
            model[0](torch.full((size[rank], 33, 1, 1), 1.0))
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path):
    forked.spawn(work, (str(tmp_path),))
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name
    joined = network(nn.BatchNorm2d)
    start = copy.deepcopy(joined.state_dict())
    train(joined, batches())
    for size in (2, 3):
        with torch.no_grad():
            joined[0](torch.full((size, 33, 1, 1), 1.0))
    for name, t in joined.state_dict().items():
        assert (states[0][name].double() - t.double()).abs().max() <= 1e-5, name
        assert not torch.equal(t, start[name]), name
