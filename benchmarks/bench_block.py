"""A residual binary block against the usual emulation of it in real numbers.

  python benchmarks/bench_block.py               four blocks, batch 1 and 8, one and all threads
  python benchmarks/bench_block.py --quick       one block, short
  python benchmarks/bench_block.py --blocks 256@14 --batch 8 --threads 1 --compile

A block is channels@size: x -> RPReLU(x + BatchNorm(3x3 binary convolution(RSign(x)))), channels in
and out. A row is a chain of them, three long unless --depth says otherwise. Timed are

  eager        sign by torch.where with a straight-through autograd.Function, conv2d of -1 and +1,
               batch norm, addition, PReLU between two shifts: PyTorch, operator by operator; in
               inference it too has taken the signs of the weights in advance
  compiled     the same through torch.compile (always on a GPU; on a CPU with --compile)
  bitkernels   inference: signs packed once, then one packed_conv2d a block, which also does batch
               norm (folded into scale and bias), addition, RPReLU and the signs for the next block;
               training: a BinaryResidualBlock each, one operator. On a GPU named after the backend:
               inference `triton`, and `cuda` where csrc/cuda takes it; training `triton`

in inference and in a training step (forward and backward, no optimizer). `saved` is what the
forward of the training step keeps for its backward, parameters apart. On a GPU the times are with
a cold L2 cache, inference also has times in a CUDA graph, and `peak` is the most memory allocated.

`match` says whether, in this run, every fused chain was equal bit for bit to the reference
operators one after the other, and close to the emulation in its first block; and whether output and
gradients of the first training block were close to the emulation's. (Not of the whole chain: a
rounding next to 0 turns a sign, and from there on two correct chains differ.)

A complete run writes block.csv, block.json and block.png to benchmarks/results/<device>, a partial
one only to --output.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from gpu_backends import Ours, by_backend
from residual_block import Block, Emulated, Fused, saved_bytes, training_step
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

BLOCKS = ("64@56", "128@28", "256@14", "512@7")
QUICK = ("256@14",)
DEPTH = 3
MODES = ("inference", "training")
OURS, BASE = "bitkernels", "eager"
# Largest relative distance (2-norm) of outputs and of gradients. A gradient turns where rounding
# moves a pre-activation across 0, which is rare in float32 and common in half precision.
CLOSE = {torch.float32: (1e-5, 1e-2), torch.float16: (1e-2, 0.1), torch.bfloat16: (5e-2, 0.3)}


@dataclass(frozen=True)
class Shape:
    name: str
    channels: int
    size: int

    @classmethod
    def parse(cls, name: str) -> Shape:
        found = re.fullmatch(r"(\d+)@(\d+)", name)
        if found is None:
            raise argparse.ArgumentTypeError(f"{name!r} is not channels@size, as 256@14")
        return cls(name, int(found[1]), int(found[2]))


class Case:
    """A chain of blocks at one batch size: ours, the emulation of it, and its operands."""

    def __init__(self, shape: Shape, batch: int, depth: int, device: common.Device,
                 compiled: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = next(iter(device.reals.values()))
        place: dict[str, Any] = {"device": device.type, "dtype": dtype,
                                 "memory_format": torch.channels_last}
        blocks = [Block(shape.channels) for _ in range(depth)]
        for block in blocks:
            block.randomize(generator)
            block.to(**place)
        size = (batch, shape.channels, shape.size, shape.size)
        self.device, self.dtype, self.where = device, dtype, f"{shape.name} batch {batch}"
        self.x, self.grad = (torch.randn(size, generator=generator).to(**place) for _ in range(2))
        self.fused = Fused(blocks)
        self.models: dict[str, Any] = {
            BASE: nn.Sequential(*map(Emulated, blocks)), OURS: nn.Sequential(*blocks)}
        if compiled:
            torch._dynamo.reset()  # a new case is no recompilation of the one before
            self.models["compiled"] = torch.compile(nn.Sequential(*map(Emulated, blocks)),
                                                    dynamic=False)

    def inference(self, fused: Fused, x: Tensor, notes: dict[str, str]):
        """(calls of a chain, kernels of csrc/cuda), both by backend."""
        ours = Ours(partial(fused, x), fused.products(x))
        return by_backend(self.device, "packed_conv2d", {"": ours}, self.where, notes)

    def match(self, notes: dict[str, str]) -> dict[str, bool]:
        """By mode, see the module's text."""
        outputs, gradients = CLOSE[self.dtype]
        ours, usual = self.models[OURS][0], self.models[BASE][0]
        with torch.inference_mode():
            equal = True
            for x in dict.fromkeys((self.x, self.x.float())):
                expected = self.fused.expected(x)
                equal &= all(torch.equal(call(), expected)
                             for call in self.inference(self.fused, x, notes)[0].values())
            first = usual.eval()(self.x)
            near = all(common.close(call(), first, outputs)
                       for call in self.inference(Fused([ours]), self.x, notes)[0].values())
        results = []
        for block in (ours.train(), usual.train()):
            norm = {name: t.clone() for name, t in block.norm.state_dict().items()}
            x = self.x.clone().requires_grad_()
            out = block(x)
            out.backward(self.grad)
            weight = block.conv.weight if block is ours else block.weight
            results.append((out.detach(), x.grad, weight.grad))
            block.zero_grad(set_to_none=True)
            block.norm.load_state_dict(norm)
        trained = all(common.close(a, b, limit) for a, b, limit in
                      zip(*results, (outputs, gradients, gradients), strict=True))
        return {"inference": equal and near, "training": trained}

    def calls(self, mode: str, notes: dict[str, str]):
        """(calls, kernels of csrc/cuda), both by provider."""
        calls: dict[str, Callable[[], object]] = {}
        kernels: dict[str, str] = {}
        leaf = self.x.clone().requires_grad_()
        for name, model in self.models.items():
            model.train(mode == "training")
            if mode == "training":
                calls[self.provider(name)] = partial(training_step, model, leaf, self.grad)
            elif name == OURS:
                own, kernels = self.inference(self.fused, self.x, notes)
                calls |= own
            else:
                calls[name] = partial(model, self.x)
        return calls, kernels

    def provider(self, model: str) -> str:
        """In training, where ours has one backend."""
        return self.device.backends[0] if model == OURS else model

    def saved(self) -> dict[str, int]:
        leaf = self.x.clone().requires_grad_()
        return {self.provider(name): saved_bytes(model, leaf)
                for name, model in self.models.items()}


@dataclass(frozen=True)
class Row:
    """One line of the table. Of training only: saved; on a GPU only: warm, peak."""

    block: str
    depth: int
    batch: int
    threads: int
    mode: str
    times: dict[str, common.Times]
    variants: dict[str, str]  # kernels of csrc/cuda
    warm: dict[str, common.Times]  # in a CUDA graph, inference
    saved: dict[str, int]  # bytes
    peak: dict[str, int]  # bytes
    match: bool

    def speedup(self, provider: str, baseline: str) -> float | None:
        if provider not in self.times:
            return None
        return self.times[baseline].p50 / self.times[provider].p50


def measure(case: Case, mode: str, seconds: float, notes: dict[str, str], each) -> dict:
    """The measured part of a row."""
    with torch.inference_mode(mode == "inference"):
        calls, kernels = case.calls(mode, notes)
        times = common.measure_in_turns(case.device, calls, seconds, each)
        warm = common.measure_warm(case.device, calls if mode == "inference" else {}, seconds,
                                   notes)
        peak = {name: case.device.peak_memory(call) for name, call in calls.items()}
    return {"times": times, "variants": kernels, "warm": warm,
            "saved": case.saved() if mode == "training" else {},
            "peak": {name: size for name, size in peak.items() if size is not None}}


def run(shapes: Sequence[Shape], batches: Sequence[int], threads: Sequence[int],
        modes: Sequence[str], depth: int, device: common.Device, compiled: bool, seconds: float,
        notes: dict[str, str]) -> list[Row]:
    rows = []
    with tqdm(total=len(shapes) * len(batches) * len(threads) * len(modes), unit="row",
              disable=None) as progress:
        for shape, batch in itertools.product(shapes, batches):
            device.set_threads(max(threads))
            case = Case(shape, batch, depth, device, compiled)
            match = case.match(notes)
            for mode, count in itertools.product(modes, threads):
                device.set_threads(count)
                label = f"{shape.name} batch {batch} {mode}"
                rows.append(Row(
                    shape.name, depth, batch, count, mode, match=match[mode],
                    **measure(case, mode, seconds, notes,
                              lambda name, label=label: progress.set_postfix_str(
                                  f"{label}, {name}"))))
                progress.update()
    return rows


def ours(rows: Sequence[Row], device: common.Device) -> list[str]:
    """Our providers, as far as they ran."""
    return [p for p in device.backends if any(p in row.times for row in rows)]


def rivals(rows: Sequence[Row]) -> list[str]:
    return [p for p in (BASE, "compiled") if p in rows[0].times]


def means(rows: Sequence[Row], device: common.Device, mode: str) -> dict[str, dict[str, float]]:
    """Geometric mean of our speed-up over each of the others, by provider."""
    part = [row for row in rows if row.mode == mode]
    return {own: {p: statistics.geometric_mean(row.speedup(own, p) for row in part)
                  for p in rivals(rows)}
            for own in ours(part, device) if all(own in row.times for row in part)}


def table(rows: Sequence[Row], device: common.Device) -> str:
    own, others = ours(rows, device), rivals(rows)
    names = [*others, *own]
    extra = {"warm": any(row.warm for row in rows), "saved": any(row.saved for row in rows),
             "peak": any(row.peak for row in rows)}
    titles = {"warm": "graph ms", "saved": "saved MB", "peak": "peak MB"}
    shown = [key for key, there in extra.items() if there]
    over = [(p, other) for p in own for other in others]
    headers = ["mode", "block", "batch", "threads", *(f"{p}\nms" for p in names),
               *(f"{p}\nover\n{other}" if len(own) > 1 else f"over\n{other}" for p, other in over),
               *(f"{p}\n{titles[key]}" for key in shown for p in names), "match"]
    lines = []
    for row in sorted(rows, key=lambda row: MODES.index(row.mode)):
        line = [row.mode, row.block, row.batch, row.threads, *(
            f"{row.times[p].p50 * 1e3:.3f}" if p in row.times else "n/a" for p in names), *(
            f"{row.speedup(p, other):.2f}x" if p in row.times else "n/a" for p, other in over)]
        for key in shown:
            values = getattr(row, key)
            line += ["" if p not in values else f"{values[p].p50 * 1e3:.3f}" if key == "warm"
                     else f"{values[p] / 1e6:.2f}" for p in names]
        lines.append([*line, "yes" if row.match else "NO"])
    return tabulate(lines, headers, stralign="right", disable_numparse=True)


def csv_rows(rows: Sequence[Row], device: common.Device, record: dict) -> Iterator[dict]:
    own = ours(rows, device)
    for row in rows:
        for provider, times in row.times.items():
            warm = row.warm.get(provider)
            yield {
                "kernel_name": "residual_block", "kernel_provider": provider, "mode": row.mode,
                "metric": "ms", "block": row.block, "depth": row.depth, "batch": row.batch,
                "threads": row.threads,
                **{q: f"{value * 1e3:.6g}" for q, value in asdict(times).items()},
                "graph_p50": f"{warm.p50 * 1e3:.6g}" if warm else "",
                **{f"{p}_speedup": f"{row.speedup(p, provider):.4g}" if p in row.times else ""
                   for p in own},
                "variant": row.variants.get(provider, ""),
                "saved_bytes": row.saved.get(provider, ""),
                "peak_bytes": row.peak.get(provider, ""),
                "match": row.match if provider in own else "",
                **{key: record[key] for key in ("device", "kernel", "bitkernels", "torch", "date")},
            }


def panels(rows: Sequence[Row], device: common.Device) -> Iterator[common.Panel]:
    """Speed over eager, so that the compiled emulation has a bar beside ours."""
    keys = dict.fromkeys((row.batch, row.threads, row.mode) for row in rows)
    for batch, threads, mode in sorted(keys):
        part = [r for r in rows if (r.batch, r.threads, r.mode) == (batch, threads, mode)]
        yield common.Panel(
            f"{mode}, batch {batch}, {threads} thread{'s' * (threads > 1)}",
            [row.block for row in part],
            {p: [row.speedup(p, BASE) for row in part]
             for p in (*rivals(rows)[1:], *ours(rows, device))})


def save(output: Path, rows: Sequence[Row], device: common.Device, record: dict) -> None:
    modes = list(dict.fromkeys(row.mode for row in rows))
    common.write_csv(output / "block.csv", list(csv_rows(rows, device, record)))
    common.write_json(output / "block.json", {
        "environment": record, "baseline": BASE, "unit": "s",
        "geometric_mean_speedup": {mode: means(rows, device, mode) for mode in modes},
        "rows": [asdict(row) for row in rows]})
    common.write_bars(
        output / "block.png", list(panels(rows, device)), len(modes),
        f"Residual binary block: speed-up over eager emulation on {device.name}\n"
        f"{record['kernel']} kernels, torch {record['torch']}, {record['date'][:10]}",
        "times faster than eager")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block, short")
    parser.add_argument("--blocks", nargs="+", type=Shape.parse, metavar="BLOCK")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"blocks in a chain ({DEPTH})")
    parser.add_argument("--batch", nargs="+", type=int,
                        help="default: 1 and 8; on a GPU 1, 64 and 256")
    parser.add_argument("--threads", nargs="+", type=int, help="default: one and all")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="time torch.compile of the emulation too; default: on a GPU")
    parser.add_argument("--min-run-time", type=float, metavar="SECONDS",
                        help="timed per provider and row (0.2; 0.05 with --quick)")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    args = parser.parse_args(arguments)
    if args.depth < 1:
        parser.error("--depth must be 1 or more")

    device = common.pick_device(args.device)
    shapes = args.blocks or [Shape.parse(name) for name in (QUICK if args.quick else BLOCKS)]
    batches, threads = args.batch or list(device.batches), args.threads or device.threads
    seconds = args.min_run_time or (0.05 if args.quick else 0.2)
    compiled = device.compiles if args.compile is None else args.compile
    notes: dict[str, str] = {}
    rows = run(shapes, batches, threads, args.mode, args.depth, device, compiled, seconds, notes)
    record = common.environment(device) | {
        "real_type": str(next(iter(device.reals.values()))).removeprefix("torch."),
        "min_run_time": seconds, "not_available": notes}

    print(f"{table(rows, device)}\n\ntimes of {args.depth} blocks; geometric mean of the speed-up")
    for mode in args.mode:
        print(f"  {mode:9}", ", ".join(f"{own} {mean:.2f}x over {name}"
                                       for own, over in means(rows, device, mode).items()
                                       for name, mean in over.items()))
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "not_available"))
    for name, reason in notes.items():
        print(f"{name} n/a: {reason}")
    common.print_caveats(device)
    complete = not args.quick and (
        shapes, batches, threads, args.mode, args.depth) == (
        [Shape.parse(name) for name in BLOCKS], list(device.batches), device.threads, list(MODES),
        DEPTH)
    output = args.output or (common.RESULTS / common.slug(device.name) if complete else None)
    if output is not None:
        save(output, rows, device, record)
        print(f"wrote {output}/block.csv, block.json and block.png")
    if not all(row.match for row in rows):
        raise SystemExit("some outputs do not match: see the last column")
    return rows


if __name__ == "__main__":
    main()
