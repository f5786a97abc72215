"""Batch norm of concatenated images: torch's values, and what is kept for the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitkernels.models import BinaryDenseNet
from bitkernels.models.concat import DenseSection, ImageInput, norm_of_concatenated
from bitkernels.models.densenet import DenseLayer


def some_parts(*channels: int) -> list[torch.Tensor]:
    return [torch.randn(3, c, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
            for c in channels]


def results(function, norm: nn.Module, parts: list[torch.Tensor], seed: torch.Tensor) -> list:
    norm = copy.deepcopy(norm)
    out = function(norm, parts)
    inputs = [*parts, *norm.parameters()]
    return [out, *torch.autograd.grad((out * seed).sum(), inputs), *norm.buffers()]


def whole(norm: nn.Module, parts: list[torch.Tensor]) -> torch.Tensor:
    return norm(torch.cat(parts, 1))


def kept_by(function) -> int:
    """Bytes of what autograd saves while the function runs."""
    storages = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        _alive = function()
    return sum(storages.values())


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm2d(16), lambda: nn.BatchNorm2d(16, momentum=None).train(),
    lambda: nn.BatchNorm2d(16, affine=False), lambda: nn.BatchNorm2d(16).eval(),
    lambda: nn.BatchNorm2d(16, track_running_stats=False)])
def test_values_gradients_and_statistics_are_torchs(make):
    norm, parts, seed = make(), some_parts(3, 8, 5), torch.randn(3, 16, 4, 5)
    for p in norm.parameters():
        nn.init.normal_(p, 1)
    for got, wanted in zip(results(norm_of_concatenated, norm, parts, seed),
                           results(whole, norm, parts, seed), strict=True):
        assert torch.equal(got, wanted)


def test_two_backwards_after_two_forwards():
    """The statistics that the second forward updates are none that the first's backward reads."""
    norm, parts = nn.BatchNorm2d(16), some_parts(3, 8, 5)
    sums = [norm_of_concatenated(norm, parts).pow(3).sum() for _ in range(2)]
    for value in sums:
        value.backward()
    assert norm.num_batches_tracked == 2 and torch.isfinite(parts[0].grad).all()


def test_a_frozen_part_and_mixed_types_under_autocast():
    norm, parts, seed = nn.BatchNorm2d(16), some_parts(3, 8, 5), torch.randn(3, 16, 4, 5)
    parts = [parts[0], parts[1].detach().bfloat16().requires_grad_(), parts[2].detach()]
    outcomes = []
    for function in (norm_of_concatenated, whole):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(copy.deepcopy(norm), parts)
        outcomes.append([out, *torch.autograd.grad((out * seed).sum(), parts[:2])])
    for got, wanted in zip(*outcomes, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_a_section_keeps_its_channels_not_their_square():
    section = DenseSection(*(DenseLayer(64 * (i + 1)) for i in range(8)))
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    pixels = 2 * 8 * 8 * 4  # bytes of a channel
    weights = sum(p.numel() * 4 for p in section.parameters())
    kept = kept_by(lambda: section(x)) - weights
    quadratic = pixels * 64 * sum(range(1, 9))
    assert kept < 0.5 * quadratic and kept > pixels * 64 * 8


def test_the_module_is_called_where_it_has_hooks():
    norm, parts, calls = nn.BatchNorm2d(16), some_parts(3, 8, 5), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    norm_of_concatenated(norm, parts)
    assert calls == [1]
    norm.forward = lambda x: x + 1
    assert torch.equal(norm_of_concatenated(norm, parts), torch.cat(parts, 1) + 1)


def test_sections_trace_and_convert():
    model = BinaryDenseNet(5, 1, layers=(2, 2), reduction=(2,), dilation=(1, 1), stem="cifar")
    x = torch.randn(4, 1, 6, 6)
    traced = torch.fx.symbolic_trace(model)
    for training in (True, False):
        assert torch.equal(copy.deepcopy(traced).train(training)(x),
                           copy.deepcopy(model).train(training)(x))
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    torch.testing.assert_close(sync(x), copy.deepcopy(model).eval()(x))
    per_image = torch.func.vmap(lambda image: copy.deepcopy(model).eval()(image[None])[0])
    torch.testing.assert_close(per_image(x), copy.deepcopy(model).eval()(x), rtol=1e-4, atol=1e-4)


def test_no_second_derivative():
    parts = some_parts(3, 13)
    out = norm_of_concatenated(nn.BatchNorm2d(16), parts)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="batch norm of a concatenation has no second deriv"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 4, 8), (1, 3, 8, 4)])
def test_images_of_other_shapes_are_named(shape):
    with pytest.raises(RuntimeError, match=r"Net: images must be \(N, C, H, W\) of at least 5"):
        ImageInput("Net", 5)(torch.zeros(shape))
