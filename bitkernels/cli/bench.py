"""`python -m bitkernels bench`: a quick table of binary against float convolutions."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bitkernels
from bitkernels import nn as bnn
from bitkernels.cli import zoo

DESCRIPTION = """\
How fast a few layers are on this machine, in less than a minute: PyTorch's convolution in float32
and bfloat16 (the faster of its two memory formats), the packed layer (real input, float32 output)
and packed_conv2d alone (words in, words out, as between two binary layers).

  python -m bitkernels bench
  python -m bitkernels bench --threads 4 --batch 8
  python -m bitkernels bench --layers 3x3:256@14 1x1:512@14 3x3:32@112

A layer is kernel:channels@size. A time is the shortest of several. "exact" says that every timed
result equals the float convolution of the signs. The complete benchmark, with training, is in
benchmarks/ of the source.
"""
LAYERS = ("3x3:64@56", "3x3:128@28", "3x3:256@14", "3x3:512@7", "1x1:512@14", "3x3:32@112",
          "3x3:16@32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="KxK:C@S",
                        help="default: those of a ResNet-18, and small ones")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: 1")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=0.25,
                        help="timed for each number; default: 0.25")


def parse(layer: str) -> tuple[int, int, int]:
    """(kernel, channels, size). Raises ValueError."""
    try:
        kernel, rest = layer.split(":")
        first, second = map(int, kernel.split("x"))
        channels, size = map(int, rest.split("@"))
    except ValueError:
        first, second, channels, size = 0, 0, 0, 0
    if first != second or min(first, channels, size) < 1 or not first % 2:
        raise ValueError(f"--layers takes KxK:CHANNELS@SIZE with an odd K, as 3x3:256@14, got "
                         f"{layer!r}")
    return first, channels, size


def measure(layer: str, batch: int, device: str, threads: int, seconds: float) -> list[Any]:
    """The layer's times in ms (float32, bfloat16, real, packed), and whether all are exact."""
    from torch.utils.benchmark import Timer

    kernel, channels, size = parse(layer)
    conv = bnn.BinaryConv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    conv = conv.eval().to(device)
    packed = conv.pack()
    ops = torch.ops.bitkernels
    x = torch.randn(batch, channels, size, size, device=device)
    signs, weight = (torch.where(t < 0, -1.0, 1.0) for t in (x, conv.weight.detach()))
    words, tiles = ops.sign_pack(x, dim=1), ops.sign_pack(conv.weight.detach(), dim=1)
    if device == "cpu":
        tiles = ops.tile_weight(tiles)
    shape: dict[str, Any] = dict(stride=1, padding=kernel // 2, out_channels=channels)

    def between() -> Tensor:
        return ops.packed_conv2d.packed(words, tiles, channels, **shape)

    def time(call: Any) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        return min(timer.blocked_autorange(min_run_time=seconds).times) * 1e3

    expected = F.conv2d(signs, weight, padding=kernel // 2)
    exact = torch.equal(packed(x), expected) and torch.equal(
        between(), ops.sign_pack(expected, dim=1))
    floats = []
    for dtype in (torch.float32, torch.bfloat16):
        both = []
        for layout in (torch.contiguous_format, torch.channels_last):
            a, b = (t.to(dtype=dtype, memory_format=layout) for t in (signs, weight))
            both.append(time(lambda a=a, b=b: F.conv2d(a, b, padding=kernel // 2)))
        floats.append(min(both))
    return [*floats, time(lambda: packed(x)), time(between), exact]


def main(options: argparse.Namespace) -> int:
    from bitkernels.backends import cpu

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = options.threads
    try:
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise ValueError("--device must be cpu, or cuda where there is a GPU, got "
                             f"{options.device!r}")
        zoo.check(options, "batch")
        if not 0 < options.seconds < 60:
            raise ValueError(f"--seconds must be above 0 and below 60, got {options.seconds}")
        for layer in options.layers:
            parse(layer)
    except ValueError as error:
        print(f"bitkernels bench: {error}", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if device == "cuda" else \
        torch.cpu.get_capabilities().get("cpu_name", "CPU")
    kernel = "GPU kernels" if device == "cuda" else f"kernels {cpu.summary()}"
    print(f"{name}, {threads} thread{'s' * (threads > 1)}, batch {options.batch}; bitkernels "
          f"{bitkernels.__version__}, torch {torch.__version__}; {kernel}\n")
    print(f"{'layer':<12}{'fp32 ms':>9}{'bf16 ms':>9}{'real ms':>9}{'packed ms':>11}"
          f"{'real, packed over fp32':>25}  exact")
    right = True
    with torch.inference_mode():
        for layer in options.layers:
            fp32, bf16, real, packed, exact = measure(layer, options.batch, device, threads,
                                                      options.seconds)
            right &= exact
            over = f"{fp32 / real:.1f}x, {fp32 / packed:.1f}x"
            print(f"{layer:<12}{fp32:>9.3f}{bf16:>9.3f}{real:>9.3f}{packed:>11.3f}{over:>25}  "
                  f"{'yes' if exact else 'NO'}", flush=True)
    if cpu.why_not and device == "cpu":
        print("\nThis was plain PyTorch, without the CPU engine: python -m bitkernels doctor")
    return 0 if right else 1
