"""Bytes that a training step moves on a GPU, an element of an image, counted without a GPU.

Of every kernel of Triton's and every call of PyTorch and the library: the sizes of the tensors that
it reads and writes, each once, where they are as large as an image or its words. Weights, vectors
and the sums of programs are left out, which do not grow with the batch.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has a launch path of its own", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the drivers are replaced", allow_module_level=True)

import bitkernels.nn as bnn
from bitkernels.backends import gpu
from bitkernels.nn import pool
from bitkernels_tests import cuda_emulator, no_gpu
from bitkernels_tests.backends import test_training_launches as training

pytestmark = pytest.mark.skipif(not cuda_emulator.available(), reason="no C++ compiler")

CHANNELS = 64
SHAPE = 16, CHANNELS, 40, 40  # its words are more than the weights
ELEMENTS = 16 * CHANNELS * 40 * 40
WORDS, HALF, DOT = 1 / 8, 2, 2  # bytes an element of signs, of float16, of int16

# Read, then written. A convolution and its sums are one launch of csrc/cuda. The dot products are
# computed twice, from signs; a convolution of the library's backward reads the output's gradient,
# and the filters or the input's signs as real numbers.
BLOCK = [
    ("sign_pack_rows_kernel", HALF + WORDS),
    ("packed_conv2d_moments", WORDS + DOT),
    ("block_forward_kernel", DOT + HALF + HALF),
    ("packed_conv2d_moments", WORDS + DOT),
    ("block_backward_kernel", HALF + DOT + HALF + HALF),  # grad, dots, residual
    ("norm_backward_kernel", HALF + DOT + HALF),
    ("unpack_kernel", WORDS + HALF),
    ("convolution_backward", HALF + HALF),  # of the input
    ("convolution_backward", HALF + HALF),  # of the weight
    ("sign_backward_kernel", HALF + HALF + HALF + HALF),  # grad, |x|, the residual's
]
# PyTorch's batch norm reads its input for the statistics and again for the values; in the backward
# input and gradient twice.
LAYERS = [
    ("sign_pack_rows_kernel", HALF + WORDS + WORDS),  # signs and the clip's mask
    ("rsign_kernel", HALF + HALF),
    ("sign_pack_rows_kernel", HALF + WORDS),
    ("packed_conv2d", WORDS + HALF),
    ("native_batch_norm", 2 * HALF + HALF),
    ("add", HALF + HALF + HALF),
    ("rprelu_kernel", HALF + HALF),
    ("rprelu_backward_kernel", HALF + HALF + HALF),
    ("native_batch_norm_backward", 2 * (HALF + HALF) + HALF),
    ("unpack_kernel", WORDS + HALF),
    ("convolution_backward", HALF + HALF),
    ("convolution_backward", HALF + HALF),
    ("mask_grad_kernel", HALF + WORDS + HALF),
    ("sum", HALF),
    ("add", HALF + HALF + HALF),  # of the two gradients of x
]


def size(values) -> float:
    """Bytes an element, of the tensors that are images."""
    tensors = {t.data_ptr(): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return sum(t.nbytes for t in tensors.values()
               if t.numel() >= ELEMENTS // 32 and t.dtype != torch.float64) / ELEMENTS


class Traffic(TorchDispatchMode):
    """What moves how many bytes, in order."""

    # Reads an operand as often as the table above says.
    AGAIN = {"native_batch_norm": 1, "native_batch_norm_backward": 2}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, float]] = []

    def add(self, name: str, moved: float) -> None:
        if moved:
            self.found.append((name, moved))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace == "bitkernels" or name in training.FREE or func.is_view:
            return out  # its kernels are seen as they are launched
        if name == "convolution_backward":
            grad, x = args[:2]
            for wanted, other in zip(args[-1], (out[0], x), strict=False):
                if wanted:
                    self.add(name, size([grad, other]))
        elif name.startswith("new_"):
            self.add(name, size(out))
        else:
            self.add(name, size([args, kwargs, out]) + HALF * self.AGAIN.get(name, 0))
        return out


def moved(monkeypatch, model, out=SHAPE) -> list[tuple[str, float]]:
    """By a training step in float16, whose outputs have this shape."""
    model = model.to(dtype=torch.float16, memory_format=torch.channels_last)
    grad = torch.randn(out).half().contiguous(memory_format=torch.channels_last)
    with no_gpu.routed(), torch.autograd.set_multithreading_enabled(False):
        traffic = Traffic()

        def run(name, *args, **kw):
            out = gpu.run(name, *args, **kw)
            if name in ("packed_conv2d", "packed_conv2d_moments"):  # one launch of csrc/cuda
                traffic.add(name, size([args, out]))
            return out

        package = importlib.import_module("bitkernels.backends.triton")
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)  # none first under the changes below, for good
        for name, module in list(sys.modules.items()):
            if name.startswith("bitkernels.ops") and hasattr(module, "inside"):
                monkeypatch.setattr(module, "inside", lambda like: run)
            if name.startswith("bitkernels.backends.triton.") and callable(
                    launch := vars(module).get("launch")):
                def seen(kernel, grid, args, *rest, launch=launch, **constants):
                    traffic.add(kernel.fn.__name__, size(args))
                    launch(kernel, grid, args, *rest, **constants)

                monkeypatch.setattr(module, "launch", seen)
        for _ in range(2):  # the first compiles, and looks at its input
            traffic.found.clear()
            x = torch.randn(SHAPE).half().contiguous(
                memory_format=torch.channels_last).requires_grad_()
            with traffic:
                model(x).backward(grad)
    return traffic.found


def test_block(monkeypatch):
    """Nothing but its passes touches an image: no copy, no cast, no other layout."""
    found = moved(monkeypatch, training.block(CHANNELS))
    assert found == BLOCK
    assert sum(bytes_ for _, bytes_ in found) == 44.5


@pytest.mark.parametrize("dtype", (None, torch.float8_e5m2), ids=str)
def test_block_in_one_pass(monkeypatch, dtype):
    """The input's gradient is not written to be read again; in float8 its own gradient is a byte,
    beside the two of the weight's."""
    monkeypatch.setattr(training.binary_residual_block, "in_one_pass", lambda *args: True)
    block, own = training.block(CHANNELS), 1 if dtype else HALF
    block.input_grad_dtype = dtype
    found = moved(monkeypatch, block)
    assert found == [*BLOCK[:5], ("norm_backward_kernel", BLOCK[5][1] + (1 if dtype else 0)),
                     BLOCK[6], BLOCK[8],
                     ("conv2d_sign_backward_kernel", own + HALF + HALF + HALF)]
    assert sum(bytes_ for _, bytes_ in found) == 40.5


def test_layers(monkeypatch):
    found = moved(monkeypatch, training.Layers(*training.parts(CHANNELS)))
    assert sorted(found) == sorted(LAYERS)  # the two branches of x in either order
    assert sum(bytes_ for _, bytes_ in found) == 64.75


def test_pooling(monkeypatch):
    """The image, a quarter of it, and a byte for each of that quarter; nothing else, of int64
    least of all."""
    monkeypatch.setattr(pool, "_on_gpu", lambda t: True)
    found = moved(monkeypatch, bnn.MaxPool2d(3, 2, 1), (16, CHANNELS, 20, 20))
    each = HALF + HALF / 4 + 1 / 4
    assert found == [("max_pool2d_kernel", each), ("max_pool2d_backward_blocks_kernel", each)]


@pytest.mark.parametrize("channels,side,megabytes", [
    (64, 56, 218.4), (128, 28, 109.2), (256, 14, 54.6), (512, 7, 27.3)])
def test_floor_of_a_block_in_evaluation(channels, side, megabytes):
    """The notebook's, batch 256: signs and float16 residual in, float16 and signs out."""
    shape = 256, channels, side, side
    words = torch.empty(256, side, side, channels // 32, dtype=torch.int32, device="meta")
    filters = torch.empty(channels, 3, 3, channels // 32, dtype=torch.int32, device="meta")
    residual = torch.empty(shape, dtype=torch.float16, device="meta")
    out = torch.ops.bitkernels.packed_conv2d.both(
        words, filters, channels, 1, 1, residual=residual, dtype=torch.float16)
    assert sum(t.nbytes for t in (words, residual, *out)) / 1e6 == pytest.approx(megabytes, abs=.05)
