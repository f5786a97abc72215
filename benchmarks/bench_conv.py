"""Binary convolutions against PyTorch's own, layer by layer.

  python benchmarks/bench_conv.py              every layer, batch 1 and 8, one and all threads;
                                               on a GPU batch 1, 64 and 256
  python benchmarks/bench_conv.py --quick      two layers, short
  python benchmarks/bench_conv.py --layers 3x3:64@56 3x3/2:128@56 --batch 1 --threads 1

A layer is kernel[/stride]:channels@size, with as many output as input channels. Timed are

  bitkernels real     real channels-last input -> sign and pack -> convolve -> real output
  bitkernels packed   packed input -> convolve, integer threshold a channel -> packed output
  fp32, bf16, ...     torch.nn.functional.conv2d, the faster of channels-last and contiguous
  int8                PyTorch's quantized convolution, int8 input and output, where it has one

On a GPU ours are named after the backend, `triton` or `cuda` (csrc/cuda, where it takes the call;
a note says why where not), and the real type: `triton fp16`, `cuda bf16`, `cuda packed`.

On a GPU these times are with a cold L2 cache; beside them stand times in a CUDA graph, with
operands in L2 as far as they fit. `of floor` is the floor over the cold time: the bytes of input,
weight and output divided by the bandwidth of a copy measured in the same run. `of peak` is the rate
of operations over that of the 1-bit tensor core alone, also measured in the same run.

A provider that is slower than the baseline is timed once where its calls are long, and so is any
call longer than its share of --budget; the rest are medians of many calls.

`match` says whether, in this run, every real output was equal to conv2d of the signs, integer by
integer, and every packed output to the bits of its comparison with the thresholds. A complete run
writes conv.csv, conv.json and conv.png to benchmarks/results/<device>, a partial one only to
--output.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from conv_table import Row, csv_rows, geometric_means, gpu_tables, panels, table
from gpu_backends import Ours, by_backend, peak_rate
from torch import Tensor
from tqdm import tqdm

ops = torch.ops.bitkernels
LAYERS = ("3x3:64@56", "3x3:128@28", "3x3:256@14", "3x3:512@7",
          "1x1:512@14", "3x3/2:128@56", "5x5:192@27", "3x3:32@112")
QUICK = ("3x3:64@56", "3x3:256@14")

@dataclass(frozen=True)
class Layer:
    name: str
    channels: int
    size: int
    kernel: int
    stride: int

    @classmethod
    def parse(cls, name: str) -> Layer:
        found = re.fullmatch(r"(\d+)x\1(?:/(\d+))?:(\d+)@(\d+)", name)
        if found is None:
            raise argparse.ArgumentTypeError(f"{name!r} is not kernel[/stride]:channels@size, "
                                             "as 3x3:64@56 or 3x3/2:128@56")
        kernel, stride, channels, size = (int(group or 1) for group in found.groups())
        return cls(name, channels, size, kernel, stride)

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def products(self, batch: int) -> int:
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return batch * out * out * self.channels * self.channels * self.kernel**2


class Case:
    """One layer at one batch size: its operands, the calls to time, and the exact answer."""

    def __init__(self, layer: Layer, batch: int, device: common.Device) -> None:
        generator = torch.Generator().manual_seed(0)
        c, k = layer.channels, layer.kernel
        # Rounded to fp16 first: a tiny negative number becomes 0 there, which has another sign.
        x = torch.randn(batch, c, layer.size, layer.size, generator=generator).half().float()
        x[torch.rand(x.shape, generator=generator) < 0.01] = 0.0
        w = torch.randn(c, c, k, k, generator=generator)
        self.layer, self.batch, self.device = layer, batch, device
        self.x = x.to(device.type, memory_format=torch.channels_last)
        self.reals = {name: self.x.to(dtype) for name, dtype in device.reals.items()}
        self.w = w.to(device.type, memory_format=torch.channels_last)
        self.conv = ([layer.stride] * 2, [layer.padding] * 2)
        words = ops.sign_pack.default(self.w, None, 1)
        self.filter = words if device.type == "cuda" else ops.tile_weight.default(words)
        self.words = ops.sign_pack.default(self.x, None, 1)
        spread = int((c * k * k) ** 0.5)
        low = torch.randint(-spread, spread + 1, (c,), generator=generator, dtype=torch.int32)
        top = torch.full_like(low, torch.iinfo(torch.int32).max)
        self.threshold = torch.stack((low, top)).to(device.type)
        self.arguments = self.filter, c, *self.conv  # all but the words
        self.options = {name: {"out_channels": c, "dtype": t} for name, t in device.reals.items()}
        self.options["packed"] = {"out_channels": c, "threshold": self.threshold}
        signs = [torch.where(t < 0, -1, 1).to(device.exact) for t in (self.x, self.w)]
        self.dot = F.conv2d(*signs, None, *self.conv).round()

    def product(self, output: str) -> Tensor:
        if output == "packed":
            return ops.packed_conv2d.packed(self.words, *self.arguments, **self.options[output])
        words = ops.sign_pack.default(self.reals[output], None, 1)
        return ops.packed_conv2d.default(words, *self.arguments, **self.options[output])

    def ours(self, notes: dict[str, str]):
        """(calls, kernels of csrc/cuda), both by provider."""
        args = self.words, *self.arguments
        outputs = {}
        for name, kw in self.options.items():
            asked = {"real": name != "packed", "packed": name == "packed"}
            outputs[name] = Ours(partial(self.product, name), [(args, {**asked, **kw})])
        where = f"{self.layer.name} batch {self.batch}"
        return by_backend(self.device, "packed_conv2d", outputs, where, notes)

    def match(self, calls: Mapping[str, Callable[[], Tensor]]) -> bool:
        """Whether each of our calls returns what it should."""
        return all(self.right(name.split()[1], call()) for name, call in calls.items())

    def right(self, output: str, found: Tensor) -> bool:
        if output != "packed":
            return torch.equal(found, self.dot.to(self.device.reals[output]))
        words = found.cpu().numpy().astype("<i4").view(np.uint8)
        bits = np.unpackbits(words, axis=-1, bitorder="little").astype(bool)
        expected = (self.dot >= self.threshold[0].view(-1, 1, 1)).movedim(1, -1).cpu().numpy()
        channels = self.layer.channels
        return (np.array_equal(bits[..., :channels], expected)
                and not bits[..., channels:].any())

    def traffic(self, provider: str) -> int:
        """Bytes of input, weight and output."""
        real = self.x.numel() + self.dot.numel()
        backend, _, output = provider.partition(" ")
        if output == "packed":
            out = self.words.shape[-1] * self.dot[:, 0].numel()  # as many channels out as in
            return 4 * (self.words.numel() + self.filter.numel() + out)
        if backend in self.device.backends:
            size = self.device.reals[output].itemsize
            return size * real + 4 * self.filter.numel()
        size = 1 if provider == "int8" else self.device.rivals[provider].itemsize
        return size * (real + self.w.numel())

    def rivals(self) -> dict[str, Callable[[], Tensor]]:
        """PyTorch's convolutions; variants of one type are named type/variant."""
        calls: dict[str, Callable[[], Tensor]] = {}
        for name, dtype in self.device.rivals.items():
            for variant, format in (("channels_last", torch.channels_last),
                                    ("contiguous", torch.contiguous_format)):
                x, w = (t.to(dtype).contiguous(memory_format=format) for t in (self.x, self.w))
                calls[f"{name}/{variant}"] = (
                    lambda x=x, w=w: F.conv2d(x, w, None, *self.conv))
        return calls

    def int8(self) -> Callable[[], Tensor]:
        """PyTorch's quantized convolution; RuntimeError where it has none."""
        dtype, zero = self.device.int8
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still PyTorch's only int8 convolution
            x = torch.quantize_per_tensor(self.x, 0.05, zero, dtype)
            w = torch.quantize_per_tensor(self.w, 0.05, 0, torch.qint8)
            weight = torch.ops.quantized.conv2d_prepack(w, None, *self.conv, [1, 1], 1)
        call = torch.ops.quantized.conv2d
        call(x, weight, 1.0, zero)
        return lambda: call(x, weight, 1.0, zero)


def measure(case: Case, threads: int, seconds: float, limit: float, bandwidth: float | None,
            notes: dict[str, str], each) -> Row:
    device = case.device
    start = time.monotonic()
    device.set_threads(threads)
    own, kernels = case.ours(notes)
    rivals = case.rivals()
    baseline = [name for name in rivals if name.partition("/")[0] == device.baseline]
    calls = {**own, **rivals}
    try:
        calls["int8"] = case.int8()
    except RuntimeError as error:
        notes.setdefault("int8", str(error).splitlines()[0])
    match = case.match(own)
    times: dict[str, common.Times] = {}
    variants: dict[str, str] = {}
    limit -= time.monotonic() - start
    if device.type == "cuda":  # the other half is for the CUDA graphs
        limit /= 2
    seconds = max(0.0, min(seconds, limit / len(calls)))
    measured = common.measure_in_turns(device, calls, seconds, each, baseline=baseline,
                                       rivals=calls.keys() - own.keys())
    for name, taken in measured.items():
        provider, _, variant = name.partition("/")
        if provider not in times or taken.p50 < times[provider].p50:
            times[provider], variants[provider] = taken, variant
    fastest = {name: calls[f"{name}/{variants[name]}" if variants[name] else name]
               for name in times}
    warm = common.measure_warm(device, fastest, seconds, notes)
    floors = {} if bandwidth is None else {p: case.traffic(p) / bandwidth for p in times}
    return Row(case.layer.name, case.batch, threads, case.layer.products(case.batch), times,
               variants | kernels, measured, warm, floors, match)


def run(layers: Sequence[Layer], batches: Sequence[int], threads: Sequence[int],
        device: common.Device, seconds: float, budget: float, notes: dict[str, str]):
    """What fits into `budget` seconds, small batches first, in equal parts; at least one row.

    Returns (rows, bit products per second that only counting bits reaches on one thread, or None;
    operations per second of a GPU's 1-bit tensor core, or None)."""
    rows: list[Row] = []
    rates: list[float] = []
    end = time.monotonic() + budget
    cases = [(batch, layer) for batch in batches for layer in layers]
    total = len(cases) * len(threads)
    bandwidth = device.copy_bandwidth()
    peak = None if bandwidth is None else peak_rate(device, notes)
    with torch.inference_mode(), tqdm(total=total, unit="row", disable=None) as progress:
        for batch, layer in cases:
            if rows and time.monotonic() > end:
                break
            left = end - 0.1 * budget - time.monotonic()  # a tenth in hand, for the last row
            due = time.monotonic() + left * len(threads) / (total - len(rows))
            case = Case(layer, batch, device)
            rate = device.popcount_rate()
            rates += [] if rate is None else [rate]
            for done, count in enumerate(threads):
                limit = (due - time.monotonic()) / (len(threads) - done)
                rows.append(measure(
                    case, count, seconds, limit, bandwidth, notes,
                    lambda name, label=f"{layer.name} batch {batch}": progress.set_postfix_str(
                        f"{label}, {name}")))
                progress.update()
    if len(rows) < total:
        notes[f"{total - len(rows)} of {total} rows"] = (
            f"{budget:g} s were over; --budget SECONDS gives more")
    order = [layer.name for layer in layers]
    rows.sort(key=lambda row: (order.index(row.layer), batches.index(row.batch),
                               threads.index(row.threads)))
    return rows, max(rates, default=None), peak


def save(output: Path, rows: Sequence[Row], device: common.Device, record: dict,
         rate: float | None, peak: float | None, means: dict[str, float]) -> None:
    common.write_csv(output / "conv.csv", list(csv_rows(rows, device, record, rate, peak)))
    common.write_json(output / "conv.json", {
        "environment": record, "baseline": device.baseline, "unit": "s",
        "geometric_mean_speedup": means,
        "rows": [asdict(row) | {"popcount_ceiling": row.ceiling(rate)} for row in rows]})
    common.write_bars(
        output / "conv.png", list(panels(rows, device)),
        len({row.threads for row in rows}),
        f"Convolution: speed-up over PyTorch's {device.baseline} on {device.name}\n"
        f"{record['kernel']} kernels, torch {record['torch']}, {record['date'][:10]}",
        f"times faster than {device.baseline}")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, short")
    parser.add_argument("--layers", nargs="+", type=Layer.parse, metavar="LAYER")
    parser.add_argument("--batch", nargs="+", type=int,
                        help="default: 1 and 8; on a GPU 1, 64 and 256")
    parser.add_argument("--threads", nargs="+", type=int, help="default: one and all")
    parser.add_argument("--min-run-time", type=float, metavar="SECONDS",
                        help="timed per provider and row (0.4; 0.05 with --quick)")
    parser.add_argument("--budget", type=float, default=150.0, metavar="SECONDS",
                        help="for the whole table (150); what takes longer is timed less often")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    args = parser.parse_args(arguments)

    device = common.pick_device(args.device)
    layers = args.layers or [Layer.parse(name) for name in (QUICK if args.quick else LAYERS)]
    threads = args.threads or device.threads
    batches = args.batch or list(device.batches)
    seconds = args.min_run_time or (0.05 if args.quick else 0.4)
    notes: dict[str, str] = {}
    rows, rate, peak = run(layers, batches, threads, device, seconds, args.budget, notes)
    means = geometric_means(rows, device.baseline)
    record = common.environment(device) | {"min_run_time": seconds, "popcount_rate": rate,
                                           "not_available": notes}
    if rows[0].floors:
        record["peak"] = peak

    print(table(rows, device, rate))
    if rows[0].floors:
        print("", *gpu_tables(rows, device, peak), sep="\n\n")
    print(f"\ngeometric mean over {device.baseline}: "
          + ", ".join(f"{name} {mean:.2f}x" for name, mean in means.items()))
    print(", ".join(f"{key} {value}" for key, value in record.items()
                    if key not in ("not_available", "popcount_rate", "peak")))
    for name, reason in notes.items():
        print(f"{name} n/a: {reason}")
    common.print_caveats(device)
    everything = len(layers) * len(batches) * len(threads) == len(rows)
    complete = everything and not args.quick and (layers, batches, threads) == (
        [Layer.parse(name) for name in LAYERS], list(device.batches), device.threads)
    output = args.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        save(output, rows, device, record, rate, peak, means)
        print(f"wrote {output}/conv.csv, conv.json and conv.png")
    if not all(row.match for row in rows):
        raise SystemExit("some outputs do not match conv2d of the signs")
    return rows


if __name__ == "__main__":
    main()
