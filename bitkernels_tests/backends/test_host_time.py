"""What the host does for a training step and a call on a GPU: counted, not timed, without one."""

from __future__ import annotations

import os
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a launch path of its own", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the drivers are replaced", allow_module_level=True)

import bitkernels.nn as bnn
from bitkernels.backends import gpu, replay
from bitkernels.nn import pool
from bitkernels.ops._record import OPERATORS
from bitkernels_tests import cuda_emulator, no_gpu
from bitkernels_tests.backends import test_training_launches as training

pytestmark = pytest.mark.skipif(not cuda_emulator.available(), reason="no C++ compiler")


@pytest.fixture(params=(True, False), ids=("cuda", "triton"))
def routed(request):
    with no_gpu.routed(request.param) as found, torch.autograd.set_multithreading_enabled(False):
        yield found


def launches(found) -> int:
    return len(found.launched) + no_gpu.NoDriver.launches


def count_step(monkeypatch, model, dtype, with_cuda: bool) -> tuple[int, object]:
    """Launches of a training step and what they are: ours, PyTorch's and the library's."""
    names = [name for name in sys.modules if name.startswith("bitkernels.ops")]
    with no_gpu.routed(with_cuda) as found:
        for name in names:  # a mode looks on, and the operators go the backend's way all the same
            if hasattr(sys.modules[name], "inside"):
                monkeypatch.setattr(sys.modules[name], "inside", lambda like: gpu.run)
        training.step(model, dtype)  # compiles
        model.zero_grad()
        found.launched.clear()
        no_gpu.NoDriver.launches = 0
        others = training.step(model, dtype)
        for name in OPERATORS:  # seen as their kernels are launched
            others.pop(name, None)
        return others.total() + launches(found), (others, found.launched)


@pytest.mark.parametrize("dtype,scale,most", [
    (torch.float16, None, 22), (torch.float32, None, 20),
    (torch.float16, "detached", 25), (torch.float32, "detached", 23)])
def test_launches_of_a_block(monkeypatch, dtype, scale, most):
    """Of forward, running statistics and backward. Triton alone sums in a launch more."""
    block = training.block(64, weight_scale=scale)
    for with_cuda in (True, False):
        count, what = count_step(monkeypatch, block, dtype, with_cuda)
        assert count == most + (not with_cuda), what


@pytest.mark.parametrize("dtype", (None, torch.float8_e5m2), ids=str)
@pytest.mark.parametrize("scale,most", [(None, 21), ("detached", 23)])
def test_launches_of_a_block_in_one_pass(monkeypatch, scale, most, dtype):
    """Filters, convolution and sums in place of filters, convolution, slopes and sums."""
    monkeypatch.setattr(training.binary_residual_block, "in_one_pass", lambda *args: True)
    block = training.block(64, weight_scale=scale)
    block.input_grad_dtype = dtype
    count, what = count_step(monkeypatch, block, torch.float16, True)
    assert count == most, what


@pytest.mark.parametrize("with_cuda", (True, False))
@pytest.mark.parametrize("scale,most", [(None, 25), ("detached", 28), ("xnor", 38)])
def test_launches_of_layers(monkeypatch, scale, most, with_cuda):
    """RSign, convolution, batch norm, addition and RPReLU one after the other, in float16."""
    layers = training.Layers(*training.parts(64, weight_scale=scale))
    count, what = count_step(monkeypatch, layers, torch.float16, with_cuda)
    assert count == most <= 40, what


@pytest.mark.parametrize("format", (torch.channels_last, torch.contiguous_format), ids=str)
def test_launches_of_a_pooling(monkeypatch, format):
    """One in each direction; from the fourth step on they are repeated."""
    monkeypatch.setattr(pool, "_on_gpu", lambda t: True)
    count, what = count_step(monkeypatch, bnn.MaxPool2d(3, 1, 1), torch.float16, False)
    assert count == 2, what
    layer, x = bnn.MaxPool2d(3, 2, 1), torch.randn(1, 8, 6, 6).contiguous(memory_format=format)
    with no_gpu.routed(False) as found:
        for _ in range(4):
            layer(x.requires_grad_()).sum().backward()
        assert len(found.launched) == 2 * 5  # once more to compare
        assert {type(entry) for entry in replay._recordings.values()} == {replay._Recording}


def test_a_step_launches_the_same_from_the_second_on(routed):
    """First as it comes, then recorded, then both ways, then repeated."""
    block, seen = training.block(64), []
    x, grad = (torch.randn(1, 64, 2, 2).to(memory_format=torch.channels_last) for _ in range(2))
    block(x)  # looks at its first input
    replay.clear()
    for _ in range(5):
        routed.launched.clear()
        no_gpu.NoDriver.launches = 0
        block(x).backward(grad)
        seen.append((list(routed.launched), no_gpu.NoDriver.launches))
    assert seen[0] == seen[1] == seen[3] == seen[4] and launches(routed) >= 14
    assert len(replay._recordings) == 6  # forward and backward, two unpacked, two gradients
    assert {type(entry) for entry in replay._recordings.values()} == {replay._Recording}


def test_a_step_enters_few_functions(routed):
    """1,284 and 1,229 on 2026-11-27, of torch's too; 3,399 before launches were repeated."""
    block = training.block(64)
    x, grad = (torch.randn(1, 64, 2, 2).to(memory_format=torch.channels_last) for _ in range(2))
    for _ in range(4):
        block(x).backward(grad)
    assert no_gpu.count_calls(lambda: block(x).backward(grad)) < 1400


def test_a_call_enters_few_functions(routed):
    words, filters = torch.zeros(1, 2, 2, 2).int(), torch.zeros(64, 3, 3, 2).int()

    def call():
        return torch.ops.bitkernels.packed_conv2d(words, filters, 64, 1, 1)

    for _ in range(4):
        call()
    assert no_gpu.count_calls(call) < 200


def test_tensor_maps_add_few_functions(monkeypatch):
    """184 instead of 174 on 2026-11-27: both maps are found by address and geometry."""
    words, filters = torch.zeros(1, 8, 8, 4).int(), torch.zeros(64, 3, 3, 4).int()
    monkeypatch.setenv("BITKERNELS_CUDA", "1")
    found = []
    for kernel in ("resident_64x64", "resident_64x64_bulk"):
        monkeypatch.setenv("BITKERNELS_CUDA_KERNEL", kernel)
        with no_gpu.routed(True):
            def call():
                return torch.ops.bitkernels.packed_conv2d(words, filters, 128, 1, 1)

            for _ in range(4):
                call()
            found.append(no_gpu.count_calls(call))
    assert found[0] < found[1] < found[0] + 20 and found[1] < 200
