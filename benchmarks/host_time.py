"""Host time of calls and training steps on a GPU, measured without one.

    python benchmarks/host_time.py [--profile] [--repeats 30]

The drivers of Triton and CUDA are replaced by ones that do nothing (bitkernels_tests/no_gpu.py), so
what is timed is Python and PyTorch's dispatcher up to the launch. Tensors are the CPU's and have
few values; the library's convolutions return what is in memory, for our block and for the emulation
alike. One thread; thread CPU time, the least and the median of interleaved repeats. Not in it:
Triton's launcher in C, the CUDA driver, the libraries and the GPU's allocator, which all take time
for each launch.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import residual_block  # noqa: E402

import bitkernels.nn as bnn  # noqa: E402
from bitkernels_tests import no_gpu  # noqa: E402

ops = torch.ops.bitkernels


def cases(dtype: torch.dtype = torch.float16) -> dict[str, Callable[[], object]]:
    """Calls by name, of one image of 64 channels and 2 x 2 pixels."""
    torch.manual_seed(0)
    shape = 1, 64, 2, 2
    block = residual_block.Block(64)
    block.randomize(torch.Generator().manual_seed(0))
    emulated = residual_block.Emulated(block)
    models = {"block": block, "emulation": emulated}
    x, grad = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()
    found: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        model.to(dtype=dtype, memory_format=torch.channels_last).train()
        found[f"{name}, step"] = lambda model=model: residual_block.training_step(model, x, grad)
        found[f"{name}, forward"] = lambda model=model: model(x)
    words, filters = torch.zeros(1, 2, 2, 2).int(), torch.zeros(64, 3, 3, 2).int()
    matrix = torch.zeros(64, 2).int()
    vectors = dict(scale=torch.ones(64), bias=torch.ones(64), residual=x.detach(), dtype=dtype)
    found["packed_conv2d"] = lambda: ops.packed_conv2d(words, filters, 64, 1, 1)
    found["packed_conv2d, epilogue"] = lambda: ops.packed_conv2d(words, filters, 64, 1, 1,
                                                                 **vectors)
    found["packed_linear"] = lambda: ops.packed_linear(words.view(-1, 2), matrix, 64)
    eval_block = residual_block.Block(64).to(dtype=dtype, memory_format=torch.channels_last).eval()
    image = x.detach()
    found["block, evaluation"] = torch.no_grad()(lambda: eval_block(image))
    conv = bnn.BinaryConv2d(64, 64, 3, padding=1, bias=False).to(dtype)
    conv.to(memory_format=torch.channels_last)

    def layer():
        conv(x).backward(grad)
        conv.weight.grad = x.grad = None

    found["BinaryConv2d, step"] = layer
    return found


def microseconds(calls: dict[str, Callable[[], object]], repeats: int
                 ) -> dict[str, tuple[float, float]]:
    """Thread CPU time of each: the least, the median."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.thread_time()
            for _ in range(5):
                call()
            times[name].append((time.thread_time() - begin) / 5 * 1e6)
    return {name: (min(t), statistics.median(t)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--profile", action="store_true", help="of a block's step, by function")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for with_cuda in (True, False):
        with (no_gpu.routed(with_cuda) as gpu,
              torch.autograd.set_multithreading_enabled(False)):
            calls = cases()
            found = microseconds(calls, options.repeats)
            print("csrc/cuda, then Triton" if with_cuda else "Triton alone")
            for name, (least, median) in found.items():
                gpu.launched.clear()
                no_gpu.NoDriver.launches = 0
                calls[name]()
                launches = len(gpu.launched) + no_gpu.NoDriver.launches
                print(f"  {name:24} {least:6.0f} {median:6.0f} us {launches:3} launches of ours, "
                      f"{no_gpu.count_calls(calls[name]):5} Python calls")
            if options.profile:
                profile = cProfile.Profile()
                profile.enable()
                for _ in range(50):
                    calls["block, step"]()
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
