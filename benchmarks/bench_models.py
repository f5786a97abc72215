"""Whole networks in inference: converted ones, their emulation, ResNet-18 and MobileNetV2.

  python benchmarks/bench_models.py                  all networks, batch 1 and 8, 20 minutes
  python benchmarks/bench_models.py --quick          two networks, small images, short
  python benchmarks/bench_models.py --models quicknet resnet18 --threads 1 2 --budget 120
  python benchmarks/bench_models.py --larq lce/bin/python     with Larq's interpreter, too:
                                                     larq_interpreter.py says how to install it

Providers of the binary networks (weights are random, norms have the statistics of noise):

  converted            bitkernels.convert(model)
  model                the network as it is before, in evaluation: its blocks on packed bits
  emulation            -1 and +1 in PyTorch's own operators, the binary weights made beforehand
  larq, larq xnnpack   the same network of Larq Zoo in Larq Compute Engine's interpreter, without
                       and with XNNPACK for its real layers; a batch is one image after the other

and of the real ones: fp32, bf16, and int8, which is static: eager by FX graph mode and the x86
backend, compiled by torchao's PT2E. `compiled` is torch.compile with freezing. Images and weights
are channels-last. On a GPU every call is a CUDA graph that is replayed.

All calls of a batch and a number of threads are timed in turns. `close` counts the images whose
logits are within 1e-4 of the model's: where rounding turns one sign of an untrained network, all
that follows differs. `peak` is the memory that a call takes beside what was there before, at the
last batch of the table (of Larq's interpreter with its weights, which it loads then); `file` the
network's file: of save_converted, torch.save of the state, or .tflite.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import bench_train
import common
import gpu_time
import model_providers
import torch
from model_networks import BINARY, REAL
from model_providers import Candidate, Network
from tabulate import tabulate
from tqdm import tqdm

OURS, BASE = "converted", "emulation"
MODELS = (*BINARY, *REAL)
QUICK = ("quicknet_small", "mobilenet_v2")
SIZE = 224
BATCHES = {"cpu": (1, 8), "cuda": (1, 64)}
LEAST = 0.05  # seconds that every call is timed, also where the budget is over
COMPILING = 0.6  # of the budget at most


@dataclass(frozen=True)
class Row:
    """One provider of one network; times in seconds a call."""

    network: str
    provider: str
    batch: int
    threads: int
    times: common.Times
    least: float
    peak: int | None
    file_bytes: int
    close: str

    @property
    def images(self) -> float:
        return self.batch / self.times.p50

    @property
    def wrong(self) -> bool:
        return model_providers.is_wrong(self.close)


class GraphDevice(bench_train.StepDevice):
    """A GPU on which calls are replays of CUDA graphs."""


def as_graphs(calls: Mapping[str, Candidate], device: common.Device, notes: dict[str, str]
              ) -> dict[str, Candidate]:
    """Each call captured once; those that cannot be are left out, with a note."""
    found = {}
    for name, one in calls.items():
        try:
            graph = gpu_time.captured(lambda _, call=one.call: call(), 1)
        except Exception as error:
            notes[f"{name} in a CUDA graph"] = str(error).splitlines()[0]
            continue
        found[name] = Candidate(graph.replay, one.file_bytes, one.close,
                                partial(device.peak_memory, one.call))
    return found


def make(names: Sequence[str], size: int, batch: int, device: common.Device, compiled: bool,
         notes: dict[str, str]) -> list[Network]:
    found = []
    for name in tqdm(names, desc="networks", disable=None):
        if name in REAL:
            found.append(model_providers.real(name, size, batch, device, compiled, notes))
        else:
            found.append(model_providers.binary(name, size, batch, device))
    return found


def measure(networks: Sequence[Network], batch: int, threads: int, device: common.Device,
            compiled: bool, end: float, larq: str | None, folder: Path, notes: dict[str, str]
            ) -> list[Row]:
    """All providers at one batch and number of threads, in the time until `end`."""
    device.set_threads(threads)
    torch._dynamo.reset()  # what was compiled for another batch goes, with its copies of weights
    start = time.monotonic()
    compile_end = start + COMPILING * max(0.0, end - start)
    found: dict[tuple[str, str], Candidate] = {}
    with contextlib.ExitStack() as stack, tqdm(desc="calls", disable=None) as progress:
        for network in networks:
            calls = model_providers.candidates(network, batch, compiled, notes,
                                               lambda: time.monotonic() > compile_end)
            calls |= stack.enter_context(model_providers.larq(larq, network.name, folder, threads,
                                                              batch, notes))
            found |= {(network.name, label): one for label, one in calls.items()}
            progress.update(len(calls))
        named = {" ".join(key): one for key, one in found.items()}
        if device.type == "cuda":
            named = as_graphs(named, device, notes)
        seconds = max(LEAST, (end - time.monotonic()) / max(1, len(named)) - LEAST)
        samples = common.samples_in_turns(
            device, {name: one.call for name, one in named.items()}, seconds,
            progress.set_postfix_str)
        peaks = {name: model_providers.peak_memory(device, one) for name, one in named.items()}
    rows = []
    for network_name, label in found:
        name = f"{network_name} {label}"
        if name in named:
            taken = samples[name]
            rows.append(Row(network_name, label, batch, threads, common.Times.of(taken), min(taken),
                            peaks[name], named[name].file_bytes, named[name].close))
    return rows


def run(names: Sequence[str], size: int, batches: Sequence[int], threads: Sequence[int],
        device: common.Device, compiled: bool, budget: float, larq: str | None,
        notes: dict[str, str]) -> list[Row]:
    torch._dynamo.config.recompile_limit = 64  # several networks of one class
    end = time.monotonic() + budget
    networks = make(names, size, max(batches), device, compiled, notes)
    settings = list(itertools.product(threads, batches))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (count, batch) in enumerate(settings):
            now = time.monotonic()
            share = max(0.0, end - now) / (len(settings) - number)
            rows += measure(networks, batch, count, device, compiled, now + share, larq,
                            Path(folder), notes)
    return rows


def speedup(rows: Sequence[Row], row: Row) -> float | None:
    """Over the fastest emulation of the same network: precisions and compilers."""
    base = min((one.times.p50 for one in rows if one.provider.startswith(BASE) and (
        one.network, one.batch, one.threads) == (row.network, row.batch, row.threads)),
        default=None)
    return None if base is None else base / row.times.p50


def table(rows: Sequence[Row]) -> str:
    """A line for a provider; for each batch and number of threads milliseconds, median and least,
    and for batches images a second."""
    settings = list(dict.fromkeys((row.threads, row.batch) for row in rows))
    headers = ["network", "provider"]
    for threads, batch in settings:
        headers += [f"batch {batch}, {threads} thr.\nms (least)", "images/s" if batch > 1 else
                    f"over\n{BASE}"]
    headers += ["peak\nMB", "file\nMB", "close"]
    by_key = {(r.network, r.provider, r.threads, r.batch): r for r in rows}
    lines = []
    for network, provider in dict.fromkeys((row.network, row.provider) for row in rows):
        line, last = [network, provider], None
        for threads, batch in settings:
            row = by_key.get((network, provider, threads, batch))
            if row is None:
                line += ["", ""]
                continue
            last, over = row, speedup(rows, row)
            line.append(f"{row.times.p50 * 1e3:.1f} ({row.least * 1e3:.1f})")
            line.append(f"{row.images:.1f}" if batch > 1 else f"{over:.2f}x" if over else "")
        assert last is not None
        close = f"{last.close}{' WRONG' * last.wrong}"
        lines.append([*line, "" if last.peak is None else f"{last.peak / 1e6:.1f}",
                      f"{last.file_bytes / 1e6:.2f}", close])
    return tabulate(lines, headers, stralign="right", disable_numparse=True)


def csv_rows(rows: Sequence[Row], record: dict) -> Iterator[dict]:
    for row in rows:
        over = speedup(rows, row)
        yield {
            "kernel_name": "inference", "kernel_provider": row.provider, "metric": "ms",
            "network": row.network, "batch": row.batch, "threads": row.threads,
            **{q: f"{value * 1e3:.6g}" for q, value in asdict(row.times).items()},
            "least": f"{row.least * 1e3:.6g}", "images_per_second": f"{row.images:.5g}",
            "over_fastest_emulation": "" if over is None else f"{over:.4g}",
            "peak_bytes": "" if row.peak is None else row.peak, "file_bytes": row.file_bytes,
            "close": row.close,
            **{key: record[key] for key in ("device", "kernel", "bitkernels", "torch", "date")}}


def panels(rows: Sequence[Row]) -> Iterator[common.Panel]:
    """Images a second of every network; of a family of providers the fastest."""
    for threads, batch in dict.fromkeys((row.threads, row.batch) for row in rows):
        part = [row for row in rows if (row.threads, row.batch) == (threads, batch)]
        networks = list(dict.fromkeys(row.network for row in part))
        best: dict[tuple[str, str], float] = {}
        for row in part:
            key = row.network, family(row.provider)
            best[key] = max(best.get(key, 0.0), row.images)
        yield common.Panel(
            f"batch {batch}, {threads} thread{'s' * (threads > 1)}", networks,
            {name: [best.get((network, name)) for network in networks]
             for name in dict.fromkeys(family(row.provider) for row in rows)})


def family(provider: str) -> str:
    """Without what is chosen by speed: compilers, and the precision of what stays real."""
    return provider.split()[0]


def save(output: Path, rows: Sequence[Row], device: common.Device, record: dict) -> None:
    common.write_csv(output / "models.csv", list(csv_rows(rows, record)))
    common.write_json(output / "models.json", {
        "environment": record, "baseline": BASE, "unit": "s", "rows": [asdict(r) for r in rows]})
    common.write_bars(
        output / "models.png", list(panels(rows)), 1,
        f"Whole networks on {device.name}\n{record['kernel']} kernels, torch {record['torch']}, "
        f"{record['date'][:10]}", "images a second")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="two networks, images of 64, batch 1 and 2, nothing compiled, short")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all")
    parser.add_argument("--size", type=int, help=f"height and width of the images ({SIZE})")
    parser.add_argument("--batch", nargs="+", type=int, help="default: 1 and 8; on a GPU 1 and 64")
    parser.add_argument("--threads", nargs="+", type=int, help="default: all")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="for everything (1200; 20 with --quick): compiled forms are left out, "
                        "and calls timed less often, where it is short")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="time compiled forms too; default: yes, but for --quick")
    parser.add_argument("--larq", metavar="PYTHON",
                        help="a Python that has larq_compute_engine and larq_zoo; default: this "
                        "one, where it has them. The first call converts, which takes a minute")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    args = parser.parse_args(arguments)
    if args.size is not None and (args.size < 32 or args.size % 32):
        parser.error(f"--size must be a multiple of 32, got {args.size}")
    for name in ("batch", "threads"):
        if any(value < 1 for value in getattr(args, name) or ()):
            parser.error(f"--{name} must be 1 or more")
    if args.budget is not None and args.budget <= 0:
        parser.error("--budget must be more than 0")
    return args


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    args = parsed(arguments)
    device = common.pick_device(args.device)
    if device.type == "cuda":
        device = GraphDevice()
    names = args.models or (QUICK if args.quick else MODELS)
    size = args.size or (64 if args.quick else SIZE)
    batches = args.batch or ((1, 2) if args.quick else BATCHES[device.type])
    threads = args.threads or device.threads[-1:]
    budget = args.budget or (20.0 if args.quick else 1200.0)
    compiled = not args.quick if args.compile is None else args.compile
    notes: dict[str, str] = {}
    larq = None
    if device.type == "cpu" and size == SIZE:
        larq = model_providers.larq_python(args.larq, notes)
    elif args.larq is not None:
        notes["larq left out"] = f"it runs on CPUs, at {SIZE}x{SIZE}"
    rows = run(names, size, batches, threads, device, compiled, budget, larq, notes)
    record = common.environment(device) | {"size": size, "budget": budget, "notes": notes}

    print(table(rows), "\n")
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "notes"))
    for name, reason in notes.items():
        print(f"{name}: {reason}")
    common.print_caveats(device)
    complete = compiled and (tuple(names), size, tuple(batches)) == (
        MODELS, SIZE, BATCHES[device.type])
    output = args.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        save(output, rows, device, record)
        print(f"wrote {output}/models.csv, models.json and models.png")
    wrong = sorted({f"{row.network} {row.provider}" for row in rows if row.wrong})
    if wrong:
        raise SystemExit(f"logits differ from the model's: {', '.join(wrong)}")
    return rows


if __name__ == "__main__":
    main()
