"""FSDP2: optimizers, clipping and metrics on the shards of binary weights, and pack in words."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bitkernels.metrics import watch
from bitkernels.nn import BinaryConv2d, BinaryLinear, pack
from bitkernels.optim import (
    Bop,
    Bop2ndOrder,
    CaseOptimizer,
    clip_latent_weights,
    is_binary_weight,
)
from bitkernels_tests import forked

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

OPTIMIZERS = {
    "foreach": lambda ps: Bop(ps, gamma=0.3, threshold=1e-9, foreach=True),
    "loop": lambda ps: Bop2ndOrder(ps, gamma=0.3, sigma=0.3, threshold=1e-9, unbiased=True)}


def network():
    torch.manual_seed(3)
    # Three rows on two processes, one row: shards of other sizes, and an empty one.
    return nn.Sequential(
        BinaryConv2d(16, 3, 3, bias=False, weight_scale="detached"), nn.Flatten(),
        BinaryLinear(27, 1, weight_scale="xnor"))


def train(model, optimizer, x):
    schedule = torch.optim.lr_scheduler.LambdaLR(
        getattr(optimizer, "optimizers", (optimizer,))[0], lambda epoch: 0.9 ** epoch)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()


def full(model):
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def check(rank, world, store):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        x = torch.randn(4, 16, 5, 5, generator=torch.Generator().manual_seed(1))
        for make in OPTIMIZERS.values():
            whole, shards = network(), network()
            for layer in (shards[0], shards):
                fully_shard(layer, mesh=mesh)

            def optimizer_of(model, make=make):
                return CaseOptimizer(model, (is_binary_weight(model), make),
                                     default=lambda ps: torch.optim.SGD(ps, lr=0.1))

            a, b = optimizer_of(whole), optimizer_of(shards)
            with watch(shards, b) as watcher:
                train(whole, a, x)
                train(shards, b, x)
                assert 0 <= watcher.scalars()["flip_ratio/0"] <= 1
                watcher.histograms()
            for name, parameter in full(shards).items():
                torch.testing.assert_close(parameter, dict(whole.named_parameters())[name])
            assert full(shards)["0.weight"].abs().eq(1).all()
            b.load_state_dict(copy.deepcopy(b.state_dict()))
            train(shards, b, x)

        whole, spread = network(), network()  # moments of each weight on one process
        train(whole, Bop(whole.parameters(), gamma=0.3, threshold=1e-9), x)
        train(spread, ZeroRedundancyOptimizer(spread.parameters(), Bop, lr=0.3, threshold=1e-9), x)
        assert all(map(torch.equal, whole.parameters(), spread.parameters()))

        shards = network()
        fully_shard(shards, mesh=mesh)
        adam = torch.optim.Adam(shards.parameters(), lr=1.0)
        clip_latent_weights(adam, shards, 0.25)
        train(shards, adam, x)
        assert full(shards)["0.weight"].abs().max() == 0.25

        for layer in (shards, nn.Sequential(shards)):
            try:
                pack(layer)
            except ValueError as error:
                assert "get_model_state_dict" in str(error) and "\n" not in str(error), error
            else:
                raise AssertionError("pack took shards")
        state = get_model_state_dict(shards, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            whole = network().eval()
            whole.load_state_dict(state)
            with torch.no_grad():
                assert torch.equal(pack(whole)(x), whole(x))
    finally:
        dist.destroy_process_group()


def test_one_process(tmp_path, keeps_threads):
    check(0, 1, tmp_path / "store")


def test_two_processes(tmp_path):
    forked.spawn(check, (2, tmp_path / "store"))
