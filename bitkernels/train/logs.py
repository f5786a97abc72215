"""Where the numbers of a run go: a CSV file, TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from bitkernels._packages import needs
from bitkernels.metrics import Histogram, Watcher
from bitkernels.train.checkpoint import replace_file
from bitkernels.train.errors import CheckpointError, TrainError

__all__ = ["COLUMNS", "Bar", "CsvLog", "TensorBoard"]

COLUMNS = ("stage", "epoch", "step", "lr", "train_loss", "train_accuracy", "held_out_loss",
           "held_out_accuracy", "flip_ratio", "c2i_ratio", "dead_weights", "saturation", "seconds")
Row = dict[str, Any]


class CsvLog:
    """One line an epoch with `COLUMNS`; what is not measured is empty.

    rows: those of the epochs before, which replace what the file has.
    """

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path = path
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(path, text.getvalue().encode())

    def add(self, row: Row) -> None:
        """Raises CheckpointError where the line cannot be written."""
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from None


class TensorBoard:
    """Curves of a run, and for binary layers those of `bitkernels.metrics` with histograms.

    One folder a stage, so that stages lie over each other: loss, accuracy, lr, metrics over all
    layers and under metric/layer, histograms of latent weights and of the inputs of signs.

    step: where the run goes on; what an interrupted run wrote after that is hidden.
    Raises TrainError without tensorboard.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainError(needs("plots", "tensorboard", error)) from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, row: Row, watcher: Watcher | None) -> None:
        """The row's numbers, and the watcher's values and histograms."""
        step = row["step"]
        for name, value in row.items():
            if name not in ("stage", "step") and not isinstance(value, str):
                self.writer.add_scalar(f"run/{name}", value, step)
        if watcher is not None:
            for name, value in watcher.scalars().items():
                if "/" in name:
                    self.writer.add_scalar(name, value, step)
            for name, histogram in watcher.histograms().items():
                self._histogram(f"histogram/{name}", histogram, step)
        self.writer.flush()

    def _histogram(self, name: str, histogram: Histogram, step: int) -> None:
        counts, edges = histogram.value.double().cpu(), histogram.edges.double()
        if not counts.sum():
            return
        middles = (edges[1:] + edges[:-1]) / 2
        filled = counts.nonzero().flatten()
        self.writer.add_histogram_raw(
            name, min=float(edges[filled[0]]), max=float(edges[filled[-1] + 1]),
            num=float(counts.sum()), sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles**2).sum()), bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(), global_step=step)

    def close(self) -> None:
        self.writer.close()


class Bar:
    """The progress of a stage on a terminal; elsewhere one line an epoch.

    Raises TrainError without tqdm.
    """

    def __init__(self, stage: str, total: int, done: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            raise TrainError(needs("progress bars", "tqdm")) from None
        self.bar = tqdm(total=total, initial=done, desc=stage, unit="step", disable=None)

    def step(self, loss: float, accuracy: float, flips: float | None, steps: int) -> None:
        self.bar.update(steps)
        self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False,
                             **({} if flips is None else {"flips": f"{flips:.2%}"}))

    def epoch(self, row: Row, epochs: int) -> None:
        flips = row["flip_ratio"]
        self.bar.write(
            f"{row['stage']} {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, accuracy "
            f"{row['train_accuracy']:.2%}, held out {row['held_out_accuracy']:.2%}"
            + (f", flips {flips:.3%}" if flips != "" else ""))

    def close(self) -> None:
        self.bar.close()
