"""What the benchmarks share: the device and its timer, the environment record, and the outputs.

Times are medians in seconds with the 20th and 80th percentile beside them. Candidates are timed in
turns, a part of the run time each, so that a slow moment of the machine meets all of them.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_time
import numpy as np
import torch

import bitkernels
from bitkernels.backends import cpu
from bitkernels.backends.cuda import dispatch as cuda
from bitkernels.backends.cuda import launch

RESULTS = Path(__file__).parent / "results"
ROUNDS = 4


@dataclass(frozen=True)
class Times:
    """Seconds a call: 20th percentile, median, 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        return cls(*(float(q) for q in np.quantile(seconds, (0.2, 0.5, 0.8))))


class CpuDevice:
    """This machine's processor: `threads` threads of PyTorch, torch.utils.benchmark's timer."""

    type = "cpu"
    backends: Sequence[str] = ("bitkernels",)  # what our packed products are named after
    # types of the real inputs and outputs of binary layers, the first that of whole networks
    reals: Mapping[str, torch.dtype] = {"real": torch.float32}
    exact = torch.float32  # sums of less than 2^24 signs are exact
    baseline = "fp32"  # speed-ups are over this
    rivals: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
    int8 = (torch.quint8, 64)  # activations: type and zero point that the int8 convolution takes
    batches = (1, 8)
    compiles = False  # whether torch.compile is timed unasked: it takes a minute on some processors

    def __init__(self) -> None:
        self.name = _cpu_name()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = sorted({1, min(torch.get_num_threads(), cores or 1)})
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.details = {"instruction_set": torch.backends.cpu.get_cpu_capability(),
                        "cores": cores, "load_before": self.load}

    def busy(self) -> bool:
        """Whether other programs took half a core or more in the minute before."""
        return self.load > 0.5

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def once(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def measure(self, call: Callable[[], object], seconds: float) -> list[float]:
        from torch.utils.benchmark import Timer

        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds).times

    def measure_warm(self, call: Callable[[], object], seconds: float) -> list[float] | None:
        """None: `measure` empties no cache here."""
        return None

    def copy_bandwidth(self) -> float | None:
        """None: operands of these sizes stay in the caches, memory is no floor."""
        return None

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        return None

    def popcount_rate(self) -> float | None:
        """Products per second of one thread that only counts bits; None without the extension."""
        return cpu.popcount_ceiling(0.02) if cpu.active() else None

    def peak_rate(self) -> float | None:
        """Operations a second of all threads that only count bits."""
        rate = self.popcount_rate()
        return None if rate is None else 2 * rate * torch.get_num_threads()

    def kernel(self) -> str:
        return cpu.active() or cpu.REFERENCE


class GpuDevice:
    """The current GPU: cuDNN picks its algorithm by trial, the L2 cache is swept before calls."""

    type = "cuda"
    backends: Sequence[str] = ("triton", "cuda")
    reals: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
    exact = torch.float64
    baseline = "bf16"
    rivals: Mapping[str, torch.dtype] = {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    int8 = (torch.qint8, 0)
    batches = (1, 64, 256)
    compiles = True

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.threads = [1]
        capability = torch.cuda.get_device_capability()
        torch.backends.cudnn.benchmark = True
        self.details = {"compute_capability": f"{capability[0]}.{capability[1]}",
                        "runtime": torch.version.cuda or torch.version.hip,
                        "cudnn": torch.backends.cudnn.version(),
                        "fp32_is_tf32": torch.backends.cudnn.allow_tf32}

    def set_threads(self, threads: int) -> None:
        """Host threads do not matter to a GPU's time."""

    def once(self, call: Callable[[], object]) -> float:
        return gpu_time.cold(call, 1)[0] / 1000

    def measure(self, call: Callable[[], object], seconds: float) -> list[float]:
        once = statistics.median(gpu_time.cold(call, 5)) / 1000
        repeats = min(max(10, int(seconds / (once + 5e-4))), 200)
        return [t / 1000 for t in gpu_time.cold(call, repeats)]

    def measure_warm(self, call: Callable[[], object], seconds: float) -> list[float] | None:
        """Seconds a call of many in one CUDA graph: no launch from the host, operands in L2."""
        from triton.testing import do_bench_cudagraph

        # It replays the graph, of `rep` milliseconds, ten times.
        milliseconds = do_bench_cudagraph(call, rep=max(1, int(100 * seconds)), return_mode="all")
        return [t / 1000 for t in milliseconds]

    def copy_bandwidth(self) -> float | None:
        """Bytes per second, read and written, of a copy that does not fit in the L2 cache."""
        source = torch.zeros(1 << 29, dtype=torch.int8, device=self.type)
        target = torch.empty_like(source)
        times = self.measure(lambda: target.copy_(source), 0.2)
        return 2 * source.numel() / float(np.median(times))

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        """Most bytes that a call allocates beside what was there before it."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def popcount_rate(self) -> float | None:
        return None

    def peak_rate(self) -> float | None:
        """Operations a second of the 1-bit tensor core with nothing else to do."""
        device = torch.device(self.type)
        reason = cuda.why_unusable(device)
        if reason is not None:
            raise RuntimeError(reason)
        call, products = launch.peak(device)
        call()
        return 2 * products / float(np.median(self.measure(call, 0.2)))

    def busy(self) -> bool:
        return False

    def kernel(self) -> str:
        own = torch._C._dispatch_has_kernel_for_dispatch_key("bitkernels::packed_conv2d", "CUDA")
        both = "triton" if cuda.mode() == "0" else "triton and csrc/cuda"
        return both if own else cpu.REFERENCE


Device = CpuDevice | GpuDevice


def pick_device(name: str | None) -> Device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return GpuDevice() if name == "cuda" else CpuDevice()


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    """Whether a is within `limit` of b, relative, in the 2-norm."""
    return bool((a.double() - b.double()).norm() <= limit * b.double().norm())


def measure_in_turns(device: Device, calls: Mapping[str, Callable[[], object]], seconds: float,
                     each: Callable[[str], object] = lambda name: None,
                     baseline: Collection[str] = (), rivals: Collection[str] = ()
                     ) -> dict[str, Times]:
    """Times of every call, about `seconds` each; `each(name)` is told of every turn."""
    samples = samples_in_turns(device, calls, seconds, each, baseline, rivals)
    return {name: Times.of(taken) for name, taken in samples.items()}


def samples_in_turns(device: Device, calls: Mapping[str, Callable[[], object]], seconds: float,
                     each: Callable[[str], object] = lambda name: None,
                     baseline: Collection[str] = (), rivals: Collection[str] = ()
                     ) -> dict[str, list[float]]:
    """Seconds of single calls, or means of a few, of every call; about `seconds` each.

    A call that takes longer than `seconds` is timed once, without warming up. So is, warmed up, one
    of `rivals` that is slower than the fastest of `baseline`, where a turn holds less than ten of
    its calls.
    """
    once: dict[str, float] = {}
    for name, call in calls.items():
        once[name] = device.once(call)
        if once[name] <= seconds:
            once[name] = device.once(call)
    slow = min((once[name] for name in baseline), default=float("inf"))
    turn = seconds / ROUNDS
    samples = {name: [taken] if taken > seconds or (name in rivals and slow < taken > turn / 10)
               else [] for name, taken in once.items()}
    turns = [name for name, taken in samples.items() if not taken]
    for _ in range(ROUNDS):
        for name in turns:
            short = 3 * once[name] < turn  # else the timer's own trials would take most of it
            samples[name] += (device.measure(calls[name], turn) if short
                              else [device.once(calls[name])])
            each(name)
    return samples


def measure_warm(device: Device, calls: Mapping[str, Callable[[], object]], seconds: float,
                 notes: dict[str, str]) -> dict[str, Times]:
    """CUDA-graph times on a GPU, of the calls that a graph can hold; nothing elsewhere."""
    times = {}
    for name, call in calls.items():
        try:
            taken = device.measure_warm(call, seconds)
        except RuntimeError as error:
            notes.setdefault(f"{name} in a CUDA graph", str(error).splitlines()[0])
            continue
        if taken is not None:
            times[name] = Times.of(taken)
    return times


def _cpu_name() -> str:
    """The model name; on x86 with family and model, since virtual machines shorten the name."""
    fields: dict[str, str] = {}
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return name


def slug(name: str) -> str:
    name = name.lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def environment(device: Device) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        **device.details,
        "kernel": device.kernel(),
        "bitkernels": bitkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def print_caveats(device: Device) -> None:
    """Why the times are not to be trusted, if so."""
    if device.busy():
        print("other programs kept this machine busy: they interrupt long calls more often than "
              "short ones, which flatters the faster side; measure again when it is idle")
    if device.kernel() == cpu.REFERENCE:
        print("bitkernels ran its reference implementation here, which is written to be read: "
              "these speeds say nothing about a compiled backend")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True)
class Panel:
    """One group of bars a label, one bar a series; None leaves a gap."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


COLORS = {"bitkernels": "#1f6feb", "bitkernels real": "#1f6feb", "bitkernels packed": "#f0883e",
          "bitkernels compiled": "#79b0f7", "triton": "#1f6feb", "triton fp16": "#1f6feb",
          "triton bf16": "#79b0f7", "triton packed": "#0b3d91", "cuda": "#f0883e",
          "cuda fp16": "#f0883e", "cuda bf16": "#f7bd8f", "cuda packed": "#b35900",
          "converted": "#1f6feb"}
GREYS = ("#9aa4af", "#c4ccd4", "#dfe4e8", "#6b7681", "#b0a99f", "#d9d2c7")


def write_bars(path: Path, panels: Sequence[Panel], columns: int, title: str, ylabel: str) -> None:
    """Grouped bars, `columns` panels a row, with a line at 1 and numbers on our bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = -(-len(panels) // columns)
    groups = max(len(panel.labels) for panel in panels)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharey=True, layout="constrained",
                                figsize=(columns * max(4.5, 0.85 * groups), 3.6 * lines + 0.8))
    for axis, panel in zip(axes.flat, panels, strict=False):
        width = 0.86 / len(panel.series)
        greys = iter(GREYS)
        for i, (name, values) in enumerate(panel.series.items()):
            at = np.arange(len(values)) + (i - (len(panel.series) - 1) / 2) * width
            bars = axis.bar(at, [v or 0 for v in values], width, label=name,
                            color=COLORS.get(name) or next(greys))
            if name in COLORS:
                axis.bar_label(bars, [f"{v:.1f}" if v else "" for v in values], fontsize=7,
                               padding=1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(panel.labels)), panel.labels, fontsize=8)
        axis.set_title(panel.title, fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel(ylabel)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
