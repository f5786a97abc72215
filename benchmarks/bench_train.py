"""Training steps of whole binary networks: fused blocks, separate layers, emulation in reals.

  python benchmarks/bench_train.py               ReActNet-18 and QuickNet at 224, fp32 and bf16
  python benchmarks/bench_train.py --quick       small images, one block a stage, short
  python benchmarks/bench_train.py --networks reactnet18 --precision bf16 --compile --threads 2
  python benchmarks/bench_train.py --networks reactnet_a --batch 128 --memory-limit 24

Timed is a step (forward, cross-entropy, backward; no optimizer) of the same network, made of

  published    the emulation as networks publish it: signs as compositions of PyTorch's functions
  lean         the emulation with an autograd.Function for the sign, which keeps its input alone
  layers       the layers of bitkernels.nn, one after the other, its max pooling too
  bitkernels   one BinaryResidualBlock operator a block

and, with --compile (on a GPU always), the same through torch.compile, as `published compiled`, ...
bf16 is autocast of the whole step. `saved` is what the forward keeps for the backward, weights not
counted (also not cast or binarized ones); `recomputed stem` is the same where the stem, whose
activations are large and real in every form, is under torch.utils.checkpoint. --checkpoint-stem
times it that way too. On a GPU `peak` is the most memory that a step allocates, and the times are
those of steps one behind the other. --memory-limit GIB adds the largest batch, a multiple of 8,
whose eager step allocates no more than that.

`match` says whether output and gradients of the network's first block, in this precision, were
close to the lean emulation's (in float64 for fp32) in this run.

A complete run writes train.csv, train.json and train.png to benchmarks/results/<device>, a partial
one only to --output.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import gpu_time
import torch
import torch.nn.functional as F
from residual_block import saved_bytes
from tabulate import tabulate
from torch import nn
from tqdm import tqdm
from training_networks import FORMS, NETWORKS, Network, in_form

OURS, BASE = "bitkernels", "published"
PRECISIONS = ("fp32", "bf16")
DEFAULT = ("reactnet18", "quicknet")
SIZE, BLOCKS = 224, 4
BATCH = {"cpu": 8, "cuda": 64}
# Largest relative distance (2-norm) of outputs and of gradients from the emulation in float64. bf16
# autocast rounds gradients on their way through the real convolutions, and what a GPU gives out.
CLOSE = {"fp32": (1e-6, 1e-4), "bf16": (5e-3, 4e-2)}


@dataclass(frozen=True)
class Row:
    """One network in one precision; all by provider, on a CPU without peak."""

    network: str
    precision: str
    batch: int
    size: int
    threads: int
    checkpoint_stem: bool
    times: dict[str, common.Times]
    saved: dict[str, int]  # bytes
    saved_recomputed_stem: dict[str, int]
    peak: dict[str, int]
    match: bool

    def images(self, provider: str) -> float:
        return self.batch / self.times[provider].p50

    def speedup(self, baseline: str, provider: str = OURS) -> float:
        return self.times[baseline].p50 / self.times[provider].p50


class Case:
    """A network in all its forms, and a batch."""

    def __init__(self, name: str, precision: str, batch: int, size: int, blocks: int,
                 device: common.Device, compiled: bool) -> None:
        torch.manual_seed(0)
        self.device, self.precision = device, precision
        self.network = NETWORKS[name](blocks).to(device.type, memory_format=torch.channels_last)
        self.x = torch.randn(batch, 3, size, size).to(device.type,
                                                      memory_format=torch.channels_last)
        self.labels = torch.arange(batch, device=device.type) % 1000
        self.eager = {form: in_form(self.network, form) for form in FORMS}
        self.models: dict[str, nn.Module] = dict(self.eager)
        if compiled:
            torch._dynamo.reset()  # a new case is no recompilation of the one before
            self.models |= {f"{form} compiled": torch.compile(model, dynamic=False)
                            for form, model in self.eager.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def step(self, model: nn.Module) -> None:
        with self.autocast():
            loss = F.cross_entropy(model(self.x).float(), self.labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    def calls(self) -> dict[str, Callable[[], object]]:
        return {name: lambda model=model: self.step(model)  # type: ignore[misc]
                for name, model in self.models.items()}

    def saved(self, checkpoint_stem: bool) -> dict[str, int]:
        self.set_checkpoint(checkpoint_stem)
        with self.autocast():
            return {name: saved_bytes(model, self.x, weights=False)
                    for name, model in self.eager.items()}

    def set_checkpoint(self, on: bool) -> None:
        for model in self.eager.values():
            model.checkpoint_stem = on

    def match(self) -> bool:
        """Whether the first block computes what the emulation does, on the stem's shape of input.

        The emulation runs in float64: in float32 PyTorch's batch norm of channels-last floats is
        off by 1e-4 at these sizes, its gradient by 3e-3 (torch 2.13, CPU); under bf16 autocast its
        weights' gradient by 0.2 at batch 48, for its convolution rounds the dot products, where
        ours are exact.
        """
        with torch.no_grad():
            stream = self.network.stem(self.x)
        grad = torch.randn_like(stream)
        results = []
        for form in (OURS, "lean"):
            block = in_form(Network(nn.Identity(), self.network.body[:1]), form).body[0]
            x = stream.clone()
            if form != OURS:
                block, x = copy.deepcopy(block).double(), x.double()
            x.requires_grad_()
            with self.autocast() if form == OURS else contextlib.nullcontext():
                out = block(x)
            out.backward(grad.to(out.dtype))
            results.append([out.detach(), x.grad, *(
                p.grad for _, p in sorted(block.named_parameters()))])
        outputs, gradients = CLOSE[self.precision]
        return all(common.close(a, b, gradients if i else outputs)
                   for i, (a, b) in enumerate(zip(*results, strict=True)))


class StepDevice(common.GpuDevice):
    """A GPU, on which a step is timed behind another: the host's part of it counts too."""

    def once(self, call: Callable[[], object]) -> float:
        return gpu_time.back_to_back(call, 0.0, 1)[0]

    def measure(self, call: Callable[[], object], seconds: float) -> list[float]:
        return gpu_time.back_to_back(call, seconds)


def largest_batch(peak: Callable[[int], int | None], limit: int, step: int = 8) -> int:
    """The largest multiple of `step` whose peak, None where there is no memory, is within `limit`.

    0 if there is none. Peaks grow with the batch.
    """
    def fits(batch: int) -> bool:
        found = peak(batch)
        return found is not None and found <= limit

    top = step
    while fits(top):
        top *= 2
    low, top = (top // 2, top) if top > step else (0, step)
    while top - low > step:
        middle = (low + top) // 2 // step * step
        low, top = (middle, top) if fits(middle) else (low, middle)
    return low


def batches_within(name: str, precision: str, size: int, blocks: int, device: common.Device,
                   limit: int) -> dict[str, int]:
    """By form."""
    def peak(batch: int, form: str) -> int | None:
        try:
            case = Case(name, precision, batch, size, blocks, device, False)
            return device.peak_memory(lambda: case.step(case.models[form]))
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()

    return {form: largest_batch(lambda batch, form=form: peak(batch, form), limit)
            for form in FORMS}


def measure(case: Case, name: str, threads: int, checkpoint_stem: bool, seconds: float,
            each: Callable[[str], object]) -> Row:
    match, saved, recomputed = case.match(), case.saved(False), case.saved(True)
    case.set_checkpoint(checkpoint_stem)
    calls = case.calls()
    times = common.measure_in_turns(case.device, calls, seconds, each)
    peak = {provider: case.device.peak_memory(call) for provider, call in calls.items()}
    return Row(name, case.precision, len(case.x), case.x.shape[-1], threads, checkpoint_stem, times,
               saved, recomputed, {p: size for p, size in peak.items() if size is not None}, match)


def run(networks: Sequence[str], precisions: Sequence[str], threads: Sequence[int], batch: int,
        size: int, blocks: int, checkpoint_stem: bool, device: common.Device, compiled: bool,
        seconds: float) -> list[Row]:
    rows = []
    cases = list(itertools.product(networks, precisions))
    with tqdm(total=len(cases) * len(threads), unit="row", disable=None) as progress:
        for name, precision in cases:
            case = Case(name, precision, batch, size, blocks, device, compiled)
            for count in threads:
                device.set_threads(count)
                rows.append(measure(
                    case, name, count, checkpoint_stem, seconds,
                    lambda provider, label=f"{name} {precision}": progress.set_postfix_str(
                        f"{label}, {provider}")))
                progress.update()
    return rows


def table(rows: Sequence[Row]) -> str:
    peaks = any(row.peak for row in rows)
    headers = ["network", "precision", "threads", "provider", "ms", "images/s", f"over\n{BASE}",
               "saved\nMB", f"{BASE}'s\nover it", "recomputed\nstem MB", f"{BASE}'s\nover it",
               *["peak\nMB"] * peaks, "match"]
    lines = []
    for row in rows:
        for provider, times in row.times.items():
            line = [row.network, row.precision, row.threads, provider, f"{times.p50 * 1e3:.1f}",
                    f"{row.images(provider):.2f}", f"{row.speedup(BASE, provider):.2f}x"]
            for saved in (row.saved, row.saved_recomputed_stem):
                here = saved.get(provider)
                line += ["", ""] if here is None else [f"{here / 1e6:.1f}",
                                                       f"{saved[BASE] / here:.2f}x"]
            line += [f"{row.peak.get(provider, 0) / 1e6:.0f}"] * peaks
            lines.append([*line, ("yes" if row.match else "NO") if provider == OURS else ""])
    return tabulate(lines, headers, stralign="right", disable_numparse=True)


def csv_rows(rows: Sequence[Row], record: dict) -> Iterator[dict]:
    for row in rows:
        for provider, times in row.times.items():
            yield {
                "kernel_name": "training_step", "kernel_provider": provider,
                "metric": "ms", "network": row.network, "precision": row.precision,
                "batch": row.batch, "size": row.size, "threads": row.threads,
                "checkpoint_stem": row.checkpoint_stem,
                **{q: f"{value * 1e3:.6g}" for q, value in asdict(times).items()},
                "images_per_second": f"{row.images(provider):.5g}",
                "bitkernels_speedup": (f"{row.speedup(provider):.4g}" if OURS in row.times
                                       else ""),
                "saved_bytes": row.saved.get(provider, ""),
                "saved_bytes_recomputed_stem": row.saved_recomputed_stem.get(provider, ""),
                "peak_bytes": row.peak.get(provider, ""),
                "match": row.match if provider == OURS else "",
                **{key: record[key] for key in ("device", "kernel", "bitkernels", "torch", "date")},
            }


def panels(rows: Sequence[Row]) -> Iterator[common.Panel]:
    """Speed over the eager published emulation."""
    for network in dict.fromkeys(row.network for row in rows):
        part = [row for row in rows if row.network == network]
        yield common.Panel(
            f"{network}, batch {part[0].batch} of {part[0].size}x{part[0].size}",
            [f"{row.precision}, {row.threads} thread{'s' * (row.threads > 1)}" for row in part],
            {p: [row.speedup(BASE, p) for row in part] for p in part[0].times if p != BASE})


def save(output: Path, rows: Sequence[Row], device: common.Device, record: dict) -> None:
    common.write_csv(output / "train.csv", list(csv_rows(rows, record)))
    common.write_json(output / "train.json", {
        "environment": record, "baseline": BASE, "unit": "s", "rows": [asdict(r) for r in rows]})
    common.write_bars(
        output / "train.png", list(panels(rows)), 2,
        f"Training step: speed-up over published emulation on {device.name}\n"
        f"{record['kernel']} kernels, torch {record['torch']}, {record['date'][:10]}",
        f"times faster than {BASE}")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="images of 64, batch 2, one block a stage, short")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(DEFAULT))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--size", type=int, help=f"height and width of the images ({SIZE})")
    parser.add_argument("--batch", type=int, help="default: 8; on a GPU 64")
    parser.add_argument("--threads", nargs="+", type=int, help="default: all")
    parser.add_argument("--checkpoint-stem", action="store_true",
                        help="time with the stem computed again in the backward")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="time torch.compile of every form too; default: on a GPU")
    parser.add_argument("--min-run-time", type=float, metavar="SECONDS",
                        help="timed per provider and row (4; 0.1 with --quick)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB",
                        help="on a GPU: also the largest batch within so much memory")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    args = parser.parse_args(arguments)
    if args.size is not None and args.size < 32:
        parser.error("--size must be 32 or more")
    if args.batch is not None and args.batch < 2:
        parser.error("--batch must be 2 or more")

    device = common.pick_device(args.device)
    if device.type == "cuda":
        device = StepDevice()
    elif args.memory_limit is not None:
        parser.error("--memory-limit is of a GPU's memory")
    size = args.size or (64 if args.quick else SIZE)
    batch = args.batch or (2 if args.quick else BATCH[device.type])
    threads = args.threads or device.threads[-1:]
    seconds = args.min_run_time or (0.1 if args.quick else 4.0)
    compiled = device.compiles if args.compile is None else args.compile
    rows = run(args.networks, args.precision, threads, batch, size, 1 if args.quick else BLOCKS,
               args.checkpoint_stem, device, compiled, seconds)
    record = common.environment(device) | {"min_run_time": seconds}

    if args.memory_limit is not None:
        record["largest_batches"] = {
            f"{name} {precision} in {args.memory_limit:g} GiB": batches_within(
                name, precision, size, 1 if args.quick else BLOCKS, device,
                int(args.memory_limit * 2**30))
            for name, precision in itertools.product(args.networks, args.precision)}

    print(table(rows), "\n")
    print(", ".join(f"{key} {value}" for key, value in record.items()))
    common.print_caveats(device)
    complete = not args.quick and not args.checkpoint_stem and (
        args.networks, args.precision, threads, batch, size) == (
        list(DEFAULT), list(PRECISIONS), device.threads[-1:], BATCH[device.type], SIZE)
    output = args.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        save(output, rows, device, record)
        print(f"wrote {output}/train.csv, train.json and train.png")
    if not all(row.match for row in rows):
        raise SystemExit("some outputs do not match: see the last column")
    return rows


if __name__ == "__main__":
    main()
