"""Gradients of a binary convolution by tables of sums over bits, against PyTorch's own backward.

  python benchmarks/bench_grad.py                          3x3 and 1x1 layers, batch 8
  python benchmarks/bench_grad.py --layers 3x3:64-128@28 --batch 64 --threads 1

A layer is kernel:channels@size, or kernel:channels in-channels out@size, of stride 1. Timed are the
gradient of the input and that of the weight's signs, from output gradients in float32 and in
bfloat16: `tables` (packed_conv2d_input_grad, packed_conv2d_weight_grad) and `library` (unpack, then
aten.convolution_backward), both channels-last. `used` is what binary_conv2d runs for this layer.
`match` says that both were within 1e-5 (2-norm; 1e-2 in bfloat16) of the library's result in
float64, in this run.

This is about CPUs: on a GPU the library runs always. A complete run writes grad.csv and grad.json
to benchmarks/results/<device>, a partial one only to --output.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import common
import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from bitkernels.ops._conv2d_backward import by_tables
from bitkernels.ops.geometry import ConvSpec

ops = torch.ops.bitkernels
LAYERS = ("3x3:64@56", "3x3:128@28", "3x3:256@14", "3x3:512@7", "1x1:64@56", "1x1:128@28",
          "1x1:256@14", "1x1:512@14", "1x1:1024@7", "3x3:32@32", "3x3:16-64@16", "3x3:64-16@16")
KINDS = ("input", "weight")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOSE = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Layer:
    name: str
    kernel: int
    channels: int
    out_channels: int
    size: int

    @classmethod
    def parse(cls, name: str) -> Layer:
        found = re.fullmatch(r"(\d+)x\1:(\d+)(?:-(\d+))?@(\d+)", name)
        if found is None or int(found[1]) % 2 == 0:
            raise argparse.ArgumentTypeError(f"{name!r} is not kernel:channels@size, as 3x3:64@56")
        kernel, channels, out, size = found.groups()
        return cls(name, int(kernel), int(channels), int(out or channels), int(size))


@dataclass(frozen=True)
class Row:
    layer: str
    gradient: str
    precision: str
    batch: int
    threads: int
    times: dict[str, common.Times]
    used: str
    match: bool

    @property
    def speedup(self) -> float:
        return self.times["library"].p50 / self.times["tables"].p50


class Case:
    """A layer's operands and its four calls."""

    def __init__(self, layer: Layer, batch: int, precision: str) -> None:
        self.layer, self.pad, self.precision = layer, layer.kernel // 2, precision
        place = {"memory_format": torch.channels_last}
        images = (batch, layer.channels, layer.size, layer.size)
        self.x = torch.randn(images).to(**place)
        self.weight = torch.randn(layer.out_channels, layer.channels, layer.kernel,
                                  layer.kernel).to(**place)
        self.grad = torch.randn(batch, layer.out_channels, layer.size, layer.size).to(
            PRECISIONS[precision], **place)
        self.words, self.weight_words = (ops.sign_pack(t, None, 1) for t in (self.x, self.weight))
        conv = ConvSpec((1, 1), (self.pad,) * 4, (1, 1), groups=1, pad_value=0)
        self.used = dict(zip(KINDS, by_tables(self.grad, self.weight, conv), strict=True))

    def tables(self, kind: str) -> Tensor:
        layer, pad = self.layer, (self.pad,)
        if kind == "input":
            return ops.packed_conv2d_input_grad(self.grad, self.weight_words, layer.channels, None,
                                                (layer.size, layer.size), pad)
        return ops.packed_conv2d_weight_grad(self.grad, self.words, layer.channels,
                                             (layer.kernel,), (1,), pad)

    def library(self, kind: str, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.grad.dtype
        x, weight = self.x.to(dtype), self.weight.to(dtype)  # only their shapes count, or:
        if kind == "weight":
            x = ops.unpack(self.words, self.layer.channels, dtype, 1)
        else:
            weight = ops.unpack(self.weight_words, self.layer.channels, dtype, 1)
        wanted = kind == "input", kind == "weight", False
        return torch.ops.aten.convolution_backward(
            self.grad.to(dtype), x, weight, None, (1, 1), (self.pad, self.pad), (1, 1), False,
            (0, 0), 1, wanted)[KINDS.index(kind)]

    def match(self, kind: str) -> bool:
        exact = self.library(kind, torch.float64)
        return all(common.close(t, exact, CLOSE[self.precision])
                   for t in (self.tables(kind), self.library(kind)))


def run(device: common.Device, layers: Sequence[Layer], batches: Sequence[int],
        precisions: Sequence[str], threads: Sequence[int], seconds: float) -> list[Row]:
    rows = []
    cases = list(itertools.product(layers, batches, precisions))
    for layer, batch, precision in tqdm(cases, unit="case", disable=None):
        case = Case(layer, batch, precision)
        for count, kind in itertools.product(threads, KINDS):
            device.set_threads(count)
            calls = {"tables": partial(case.tables, kind), "library": partial(case.library, kind)}
            times = common.measure_in_turns(device, calls, seconds, lambda name: None)
            rows.append(Row(layer.name, kind, precision, batch, count, times,
                            "tables" if case.used[kind] else "library", case.match(kind)))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [[row.layer, row.gradient, row.precision, row.batch, row.threads,
              *(f"{row.times[p].p50 * 1e3:.3f}" for p in ("library", "tables")),
              f"{row.speedup:.2f}x", row.used, "yes" if row.match else "NO"] for row in rows]
    return tabulate(lines, ["layer", "gradient", "precision", "batch", "threads", "library\nms",
                            "tables\nms", "over\nlibrary", "used", "match"],
                    disable_numparse=True)


def csv_rows(rows: Sequence[Row], record: dict) -> Iterator[dict]:
    for row in rows:
        for provider, times in row.times.items():
            yield {"kernel_name": f"conv2d_{row.gradient}_grad", "kernel_provider": provider,
                   "metric": "ms", "layer": row.layer, "precision": row.precision,
                   "batch": row.batch, "threads": row.threads,
                   **{q: f"{value * 1e3:.6g}" for q, value in asdict(times).items()},
                   "speedup": f"{row.speedup:.4g}", "used": row.used, "match": row.match,
                   **{key: record[key] for key in ("device", "kernel", "bitkernels", "torch",
                                                   "date")}}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=Layer.parse, metavar="LAYER")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS),
                        default=list(PRECISIONS))
    parser.add_argument("--threads", nargs="+", type=int, help="default: one and all")
    parser.add_argument("--min-run-time", type=float, default=0.2, metavar="SECONDS",
                        help="timed per provider and row (0.2)")
    parser.add_argument("--output", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    device = common.pick_device("cpu")
    if device.kernel() == "reference":
        parser.error("the C++ engine is not there (python -m bitkernels says why)")
    complete = (args.layers is None and args.threads is None and args.batch == [8]
                and args.precision == list(PRECISIONS))
    layers = args.layers or [Layer.parse(name) for name in LAYERS]
    rows = run(device, layers, args.batch, args.precision, args.threads or device.threads,
               args.min_run_time)
    record = common.environment(device) | {"min_run_time": args.min_run_time}
    print(table(rows))
    print(", ".join(f"{key} {value}" for key, value in record.items()))
    common.print_caveats(device)
    output = args.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        common.write_csv(output / "grad.csv", list(csv_rows(rows, record)))
        common.write_json(output / "grad.json", {
            "environment": record, "unit": "s", "rows": [asdict(row) for row in rows]})
        print(f"wrote {output}/grad.csv and grad.json")
    if not all(row.match for row in rows):
        raise SystemExit("some outputs do not match: see the last column")
    return rows


if __name__ == "__main__":
    main()
