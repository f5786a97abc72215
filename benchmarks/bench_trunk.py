"""The 3x3 binary convolutions of a ResNet-18, one after the other, against real ones.

  python benchmarks/bench_trunk.py               16 convolutions, batch 64 on a GPU, 1 on a CPU
  python benchmarks/bench_trunk.py --batch 256
  python benchmarks/bench_trunk.py --depth 1 --size 16    one a stage, on small images

Four stages of four convolutions: 64@56, 128@28, 256@14, 512@7 (channels@size), the first of the
second and of each later stage with stride 2 from the stage before. Ours takes packed signs, and
hands packed signs from layer to layer by an integer threshold a channel. The others are
torch.nn.functional.conv2d alone, from output to input, in bf16 on a GPU and fp32 on a CPU,
channels-last and contiguous; `over` compares with the faster of the two.

On a GPU ours stands once for each backend, `triton` and `cuda`; the times are with a cold L2 cache,
and beside them those in a CUDA graph. POPS are operations over the cold time; `of peak` is that
over the rate at which the 1-bit tensor core (on a CPU, counting bits) runs alone in this run.
`match` says whether in this run every layer's words were those of the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from gpu_backends import Ours, by_backend, peak_rate
from tabulate import tabulate
from torch import Tensor

from bitkernels import reference

ops = torch.ops.bitkernels
STAGES = (64, 128, 256, 512)
DEPTH, SIZE = 4, 56
BATCH = {"cpu": 1, "cuda": 64}
PADDING = (1, 1)


class Trunk:
    """The convolutions with random filters and thresholds, and a batch."""

    def __init__(self, depth: int, size: int, batch: int, device: common.Device) -> None:
        self.device, self.batch, self.size = device, batch, size
        self.layers: list[tuple[tuple, dict]] = []  # all but the words, keywords
        self.filters: list[Tensor] = []
        self.operations = 0
        channels = STAGES[0]
        for width in STAGES:
            for number in range(depth):
                stride = 2 if number == 0 and width != STAGES[0] else 1
                size = -(-size // stride)
                products = 9 * channels
                self.operations += 2 * batch * size**2 * width * products
                self._add(width, channels, stride, int(products**0.5))
                channels = width
        self.words = self._random(batch, self.size, self.size, STAGES[0] // 32)

    def _random(self, *shape: int) -> Tensor:
        return torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int32, device=self.device.type)

    def _add(self, width: int, channels: int, stride: int, spread: int) -> None:
        words = self._random(width, 3, 3, channels // 32)
        low = torch.randint(-spread, spread + 1, (width,), dtype=torch.int32)
        top = torch.full_like(low, torch.iinfo(torch.int32).max)
        self.filters.append(words)
        self.layers.append((
            (words if words.is_cuda else ops.tile_weight.default(words), channels, (stride, stride),
             PADDING),
            {"out_channels": width, "threshold": torch.stack((low, top)).to(self.device.type)}))

    def __call__(self) -> list[Tensor]:
        """The words of every layer."""
        outputs = [self.words]
        for args, kw in self.layers:
            outputs.append(ops.packed_conv2d.packed(outputs[-1], *args, **kw))
        return outputs[1:]

    def expected(self) -> list[Tensor]:
        outputs = [self.words]
        for filter, ((_, *args), kw) in zip(self.filters, self.layers, strict=True):
            _, words = reference.packed_conv2d(outputs[-1], filter, *args, real=False, packed=True,
                                               threshold=kw["threshold"])
            outputs.append(words)
        return outputs[1:]

    def ours(self, notes: dict[str, str]):
        """(calls, kernels of csrc/cuda), both by provider."""
        inputs = [self.words, *self()[:-1]]
        products = [((words, *args), {"real": False, "packed": True, **kw})
                    for words, (args, kw) in zip(inputs, self.layers, strict=True)]
        return by_backend(self.device, "packed_conv2d", {"packed": Ours(self, products)},
                          f"batch {self.batch}", notes)

    def real(self) -> dict[str, Callable[[], Tensor]]:
        """The library's convolutions alone, by type and memory format."""
        name = self.device.baseline
        calls = {}
        for format in (torch.channels_last, torch.contiguous_format):
            place = {"dtype": self.device.rivals[name], "memory_format": format}
            x = torch.randn(self.batch, STAGES[0], self.size, self.size, device=self.device.type)
            x = x.to(**place)
            weights = [torch.randn(kw["out_channels"], args[1], 3, 3, device=self.device.type)
                       .div((9 * args[1]) ** 0.5).to(**place) for args, kw in self.layers]

            def call(x=x, weights=weights) -> Tensor:
                for weight, (args, _) in zip(weights, self.layers, strict=True):
                    x = F.conv2d(x, weight, None, args[2], PADDING)
                return x

            calls[f"{name} {str(format).removeprefix('torch.')}"] = call
        return calls


def matches(call: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))


def run(trunk: Trunk, seconds: float, notes: dict[str, str]):
    """(rows, peak in operations a second)."""
    device = trunk.device
    peak = peak_rate(device, notes)
    with torch.inference_mode():
        own, kernels = trunk.ours(notes)
        expected = trunk.expected()
        checked = {name: matches(call, expected) for name, call in own.items()}
        others = trunk.real()
        cold = common.measure_in_turns(device, {**own, **others}, seconds)
        warm = common.measure_warm(device, {**own, **others}, seconds, notes)
    fastest = {"": min(cold[name].p50 for name in others),
               "graph ": min((warm[name].p50 for name in others if name in warm), default=None)}
    rows = []
    for name, times in cold.items():
        rate = trunk.operations / times.p50
        graph = warm[name].p50 if name in warm else None
        rows.append({
            "provider": name, "ms": 1e3 * times.p50, "ms p20": 1e3 * times.p20,
            "ms p80": 1e3 * times.p80, "graph ms": 1e3 * graph if graph else None,
            "POPS": rate / 1e15, "of peak": rate / peak if peak and name in own else None,
            **{f"{kind}over {device.baseline}": best / time if best and time else None
               for (kind, best), time in zip(fastest.items(), (times.p50, graph), strict=True)},
            "match": checked.get(name), "kernel": kernels.get(name)})
    return rows, peak


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"layers a stage ({DEPTH})")
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels a side at first ({SIZE})")
    parser.add_argument("--batch", type=int, help="default: 1; on a GPU 64")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--min-run-time", type=float, default=0.4, metavar="SECONDS")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    args = parser.parse_args(arguments)
    if args.depth < 1 or args.size < 1:
        parser.error("--depth and --size must be 1 or more")
    device = common.pick_device(args.device)
    batch = args.batch or BATCH[device.type]
    threads = args.threads or device.threads[-1]
    device.set_threads(threads)
    torch.manual_seed(0)
    notes: dict[str, str] = {}
    rows, peak = run(Trunk(args.depth, args.size, batch, device), args.min_run_time, notes)
    record = common.environment(device) | {
        "depth": args.depth, "size": args.size, "batch": batch, "threads": threads, "peak": peak,
        "not_available": notes}

    print(f"{len(STAGES) * args.depth} convolutions, batch {batch}, {threads} threads, "
          f"{device.name}, torch {torch.__version__}"
          + (f"; 1-bit arithmetic alone: {peak / 1e15:.3g} POPS" if peak else ""))
    print(tabulate(rows, headers="keys", floatfmt=".4f", missingval="-"))
    for name, note in notes.items():
        print(f"{name} n/a: {note}")
    complete = (args.depth, args.size, batch, threads) == (
        DEPTH, SIZE, BATCH[device.type], device.threads[-1])
    output = args.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        common.write_csv(output / "trunk.csv", rows)
        common.write_json(output / "trunk.json", {"environment": record, "rows": rows})
        print(f"wrote {output}/trunk.csv and trunk.json")
    if any(row["match"] is False for row in rows):
        raise SystemExit("some layers do not match the reference")
    return rows


if __name__ == "__main__":
    main()
