"""`SyncBatchNorm` of one process is torch's batch norm, also where a mean is large."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bitkernels import nn as bnn
from bitkernels.nn import SyncBatchNorm
from bitkernels.train.distributed import Group, synchronised

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone, so that collectives run."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [
    {}, dict(affine=False), dict(momentum=None), dict(track_running_stats=False), dict(eps=1e-2)])
@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (4, 3, 5, 2))])
def test_sync_batch_norm_is_torchs(alone, kind, shape, options):
    """Values, gradients and running statistics in float64, over two steps and in evaluation."""
    ours = theirs = kind(3, dtype=torch.float64, **options)
    if options.get("affine", True):
        nn.init.uniform_(theirs.weight, 0.5, 2)
        nn.init.normal_(theirs.bias)
    ours = synchronised(nn.Sequential(copy.deepcopy(theirs)), Group(0, 2), torch.device("cpu"))[0]
    assert type(ours) is SyncBatchNorm and type(theirs) is kind
    for training in (True, True, False):
        x = 3 * torch.randn(shape, dtype=torch.float64) + 1
        grad = torch.randn_like(x)
        results = []
        for layer in (ours, theirs):
            layer.train(training)
            layer.zero_grad()
            input = x.clone().requires_grad_()
            output = layer(input)
            output.backward(grad)
            results.append([output, input.grad, *(p.grad for p in layer.parameters()),
                            *layer.buffers()])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a.double(), b.double(), 1e-10, 1e-12)


def test_sync_batch_norm_refuses_one_value(alone):
    with pytest.raises(ValueError, match="more than one value per channel"):
        SyncBatchNorm(3)(torch.randn(1, 3))


@pytest.mark.parametrize("mean, deviation", [(0, 1), (100, 1), (1000, 0.3), (3000, 0.1)])
def test_a_large_mean_cancels_nothing(alone, mean, deviation):
    """Against float64; torch's own is off by 8e-4 at 3000 and 0.1."""
    x = mean + deviation * torch.randn(64, 3, 5, 5)
    exact = nn.BatchNorm2d(3, dtype=torch.float64)
    grad = torch.randn_like(x)
    wide, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    ours = SyncBatchNorm(3)
    for layer, input, g in ((exact, wide, grad.double()), (ours, narrow, grad)):
        layer(input).backward(g)
    assert (ours(x).double() - exact(x.double())).abs().max() <= 5e-6
    scale = wide.grad.abs().max()
    assert (narrow.grad.double() - wide.grad).abs().max() <= 2e-6 * scale
    for a, b in zip(ours.buffers(), exact.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), 1e-6)


def test_without_a_group_it_is_an_ordinary_batch_norm():
    ours, theirs, x = SyncBatchNorm(3), nn.BatchNorm2d(3), torch.randn(4, 3, 5, 2)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_blocks_of_many_processes_stay_fused(alone):
    """`synchronised` puts this norm into every block."""
    conv = bnn.BinaryConv2d(8, 8, 3, padding=1, bias=False)
    block = bnn.BinaryResidualBlock(conv, nn.BatchNorm2d(8))
    synchronised(block, Group(0, 2), torch.device("cpu"))
    assert type(block.norm) is SyncBatchNorm
    assert block.unfused(torch.randn(2, 8, 4, 4)) is None


def test_batch_statistics_in_one_graph():
    """Nothing looks at values where there is no process group."""
    norm, x = bnn.SyncBatchNorm(3, track_running_stats=False).eval(), torch.randn(4, 3, 5, 5)
    exported = torch.export.export(norm, (x,)).module()
    torch.testing.assert_close(exported(x), norm(x))
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm(torch.randn(1, 3, 1, 1))
