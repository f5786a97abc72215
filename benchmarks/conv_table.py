"""A row of bench_conv.py, and how rows are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import common
from gpu_backends import title
from tabulate import tabulate

PACKED = "bitkernels packed"  # on a CPU


@dataclass(frozen=True)
class Row:
    """One layer, batch and number of threads: the fastest variant of every provider."""

    layer: str
    batch: int
    threads: int
    products: int
    times: dict[str, common.Times]
    variants: dict[str, str]  # memory format of the others, kernel of csrc/cuda
    measured: dict[str, common.Times]  # every variant
    warm: dict[str, common.Times]  # the fastest variants in a CUDA graph; on a GPU only
    floors: dict[str, float]  # seconds that the memory traffic takes; on a GPU only
    match: bool

    def speedup(self, provider: str, baseline: str) -> float | None:
        if provider not in self.times:
            return None
        return self.times[baseline].p50 / self.times[provider].p50

    def of_floor(self, provider: str) -> float | None:
        if provider not in self.times:
            return None
        return self.floors[provider] / self.times[provider].p50

    def of_peak(self, provider: str, peak: float | None) -> float | None:
        """Part of the 1-bit tensor core's rate, in operations a second."""
        if provider not in self.times or peak is None:
            return None
        return 2 * self.products / self.times[provider].p50 / peak

    def ceiling(self, rate: float | None) -> float | None:
        """Part of the popcount rate that the packed convolution reaches."""
        if rate is None:
            return None
        return self.products / self.times[PACKED].p50 / (rate * self.threads)


def ours(rows: Sequence[Row], device: common.Device) -> list[str]:
    """Our providers, as far as they ran."""
    names = [f"{backend} {output}" for backend in device.backends
             for output in (*device.reals, "packed")]
    return [name for name in names if any(name in row.times for row in rows)]


def geometric_means(rows: Sequence[Row], baseline: str) -> dict[str, float]:
    everywhere = [p for p in rows[0].times if all(p in row.times for row in rows)]
    return {provider: statistics.geometric_mean(row.speedup(provider, baseline) for row in rows)
            for provider in everywhere if provider != baseline}


def _cell(value: float | None, format: str) -> str:
    return "n/a" if value is None else f"{value:{format}}"


def _ms(times: dict[str, common.Times], provider: str, format: str) -> str:
    return _cell(times[provider].p50 * 1e3 if provider in times else None, format)


def table(rows: Sequence[Row], device: common.Device, rate: float | None) -> str:
    base, own = device.baseline, ours(rows, device)
    providers = [*device.rivals, "int8", *own]
    headers = ["layer", "batch", "threads", *(f"{title(p)}\nms" for p in providers),
               *(f"{title(p)}\nover {base}" for p in own), "match"]
    if rate is not None:
        headers.append("of popcount\nceiling")
    lines = []
    for row in rows:
        line = [row.layer, row.batch, row.threads, *(_ms(row.times, p, ".3f") for p in providers),
                *(_cell(row.speedup(p, base), ".2f") + "x" * (p in row.times) for p in own),
                "yes" if row.match else "NO"]
        if rate is not None:
            line.append(_cell(row.ceiling(rate), ".0%"))
        lines.append(line)
    return tabulate(lines, headers, stralign="right", disable_numparse=True)


def gpu_tables(rows: Sequence[Row], device: common.Device, peak: float | None) -> Iterator[str]:
    """Times in a CUDA graph; the parts of floor and peak that the cold times are."""
    own = ours(rows, device)
    providers = [*device.rivals, "int8", *own]
    first = [["layer", "batch", *(f"{title(p)}\ngraph ms" for p in providers)],
             *([row.layer, row.batch, *(_ms(row.warm, p, ".4f") for p in providers)]
               for row in rows)]
    second = [["layer", "batch", *(f"{title(p)}\nof {what}" for what in ("floor", "peak")
                                   for p in own)],
              *([row.layer, row.batch, *(_cell(row.of_floor(p), ".0%") for p in own),
                 *(_cell(row.of_peak(p, peak), ".0%") for p in own)] for row in rows)]
    for headers, *lines in (first, second):
        yield tabulate(lines, headers, stralign="right", disable_numparse=True)


def csv_rows(rows: Sequence[Row], device: common.Device, record: dict, rate: float | None,
             peak: float | None) -> Iterator[dict]:
    """One line a row and provider, so that files of different devices can be joined."""
    own = ours(rows, device)
    for row in rows:
        for provider, times in row.times.items():
            gpu = {}
            if row.floors:
                warm = row.warm.get(provider)
                part = row.of_peak(provider, peak) if provider in own else None
                gpu = {"graph_p50": f"{warm.p50 * 1e3:.6g}" if warm else "",
                       "floor": f"{row.floors[provider] * 1e3:.6g}",
                       "of_floor": f"{row.of_floor(provider):.4g}",
                       "of_peak": "" if part is None else f"{part:.4g}"}
            yield {
                "kernel_name": "packed_conv2d", "kernel_provider": provider, "mode": "inference",
                "metric": "ms", "layer": row.layer, "batch": row.batch, "threads": row.threads,
                **{q: f"{value * 1e3:.6g}" for q, value in asdict(times).items()},
                "variant": row.variants[provider],
                f"speedup_over_{device.baseline}":
                    f"{row.speedup(provider, device.baseline):.4g}",
                **gpu,
                "match": row.match if provider in own else "",
                "popcount_ceiling":
                    f"{row.ceiling(rate):.4g}" if rate and provider == PACKED else "",
                "device": record["device"], "kernel": record["kernel"],
                "bitkernels": record["bitkernels"], "torch": record["torch"],
                "date": record["date"],
            }


def panels(rows: Sequence[Row], device: common.Device) -> Iterator[common.Panel]:
    baseline, own = device.baseline, ours(rows, device)
    for batch in dict.fromkeys(row.batch for row in rows):
        for threads in dict.fromkeys(row.threads for row in rows):
            part = [row for row in rows if (row.batch, row.threads) == (batch, threads)]
            means = geometric_means(part, baseline)
            order = sorted(means, key=lambda p: p in own)
            yield common.Panel(
                f"batch {batch}, {threads} thread{'s' * (threads > 1)}",
                [*(row.layer.replace(":", "\n") for row in part), "geometric\nmean"],
                {p: [*(row.speedup(p, baseline) for row in part), means[p]] for p in order})
