"""Where the time of a converted network goes, call by call."""

from __future__ import annotations

import io
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bitkernels._files import replace_file
from bitkernels._packages import needs
from bitkernels.converter.converted import Converted
from bitkernels.converter.engine import Engine
from bitkernels.converter.net import INT8, WITH_WORDS, arguments, aten, ops

_REAL = tuple(map(str, (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
                        aten.linear.default, *INT8)))
_BINARY = tuple(map(str, (*WITH_WORDS, ops.packed_conv_transpose2d.default)))
PARTS = ("stem", "binary", "real", "glue")


@dataclass(frozen=True)
class Timed:
    """A call of a converted network.

    name: the buffer with its weight, else the call's own.
    part: "binary", a product of bits; "stem", whatever comes before the first of them; "real", a
      real convolution or linear layer behind it; "glue", everything else.
    ms: median of the repeats. macs: multiply-adds of products and real layers, of one bit or real;
      0 for glue.
    """

    name: str
    operator: str
    part: str
    ms: float
    macs: int


@dataclass(frozen=True)
class Profile:
    """The calls of a network in order, and on what they were timed.

    runs: "engine" for the C++ engine, whose calls are its steps, of one or several nodes of the
      graph; else "torch: " and why.
    constants, activations: bytes of the engine's constants, and of its activations at their peak.
    """

    calls: tuple[Timed, ...]
    device: str
    threads: int
    runs: str
    constants: int | None = None
    activations: int | None = None

    @property
    def ms(self) -> float:
        return sum(call.ms for call in self.calls)

    def parts(self) -> dict[str, float]:
        """Milliseconds of stem, binary, real and glue."""
        return {part: sum(c.ms for c in self.calls if c.part == part) for part in PARTS}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ms": self.ms, "parts": self.parts()}

    def __str__(self) -> str:
        rows = [("name", "operator", "part", "ms", "share", "GMAC/s")]
        for c in self.calls:
            rate = f"{c.macs / c.ms / 1e6:.1f}" if c.macs and c.ms else ""
            rows.append((c.name, c.operator, c.part, f"{c.ms:.3f}", f"{c.ms / self.ms:.1%}", rate))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(
            zip(row, widths, strict=True))).rstrip() for row in rows]
        shares = ", ".join(f"{part} {ms:.2f} ms ({ms / self.ms:.0%})"
                           for part, ms in self.parts().items())
        threads = "" if self.device != "cpu" else f", {self.threads} threads"
        lines += ["", f"{self.ms:.2f} ms on {self.device}{threads}: {shares}",
                  f"run by {self.runs}"]
        if self.activations is not None:
            lines[-1] += (f": {self.constants:,} bytes of constants, {self.activations:,} of "
                          "activations")
        return "\n".join(lines)

    def chart(self, path: str | os.PathLike) -> None:
        """Draw multiply-adds against milliseconds of each product and real layer, as Larq Compute
        Engine's paper does of networks (arXiv 2011.09398), and the parts' shares.

        Raises ImportError without the package matplotlib, ValueError for a suffix that it does not
        draw, OSError where the file cannot be written, which is then as it was.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(needs("the chart of a profile", "matplotlib")) from None
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        for part in PARTS[:3]:
            found = [c for c in self.calls if c.part == part and c.macs]
            left.scatter([c.macs / 1e6 for c in found], [c.ms for c in found], label=part, s=14)
        left.set(xlabel="million multiply-adds", ylabel="ms", xscale="log", yscale="log")
        left.legend()
        shares = self.parts()
        right.bar(list(shares), list(shares.values()))
        right.set(ylabel="ms", title=f"{self.ms:.2f} ms on {self.device}")
        drawn = io.BytesIO()
        figure.savefig(drawn, format=Path(path).suffix.removeprefix(".") or "png")
        replace_file(Path(path), drawn.getvalue())


def profile(network: Converted, *inputs: Any, repeats: int = 20) -> Profile:
    """Time every call of a converted network on these inputs, one after the other.

    Each is run `repeats` times in the whole network's order, and synchronized on a GPU, so that a
    call finds the caches as in use. What lies between calls, about 10 us each where PyTorch runs
    them, is left out, and so is what a CUDA graph would overlap.

    Raises ValueError for another module and for repeats below 1, RuntimeError for inputs that are
    not as the example_inputs of `convert`.
    """
    if not isinstance(network, Converted):
        raise ValueError("profile: network must be what bitkernels.convert(model) returns, got "
                         f"{type(network).__name__}")
    if repeats < 1:
        raise ValueError(f"profile: repeats must be at least 1, got {repeats}")
    values = tree_leaves((inputs, {}))
    device = next((t.device for t in values if isinstance(t, Tensor)), torch.device("cpu"))
    with torch.no_grad():
        network(*inputs)  # warms up, and checks the inputs
        engine = network.engine(*inputs)
        runs = [_Timing(network, device)
                for _ in range(1 if isinstance(engine, Engine) else repeats)]
        for run in runs:
            run.run(*values)
        if isinstance(engine, Engine):
            return _of_engine(engine, values, runs[0], repeats)
    calls = [(_name(network, node), str(node.target), statistics.median(
        run.seconds[node] for run in runs), macs) for node, macs in runs[-1].macs.items()]
    return Profile(_parted(calls), str(device), torch.get_num_threads(), f"torch: {engine}")


def _of_engine(engine: Engine, values: list[Tensor], counted: _Timing, repeats: int) -> Profile:
    """By the engine's steps. Products are counted by one run in PyTorch, and found by weight."""
    macs: dict[str, list[int]] = {}
    for node, count in counted.macs.items():
        if count:
            macs.setdefault(_name(counted.network, node), []).append(count)
    runs = [engine.timed(values) for _ in range(repeats)]
    calls = []
    for i, step in enumerate(runs[0]):
        of_weight = macs.get(step.weight, [])
        calls.append((step.weight or step.name, step.operator, statistics.median(
            run[i].seconds for run in runs), of_weight.pop(0) if of_weight else 0))
    return Profile(_parted(calls), "cpu", torch.get_num_threads(), "engine",
                   *engine.memory(values))


def _parted(calls: list[tuple[str, str, float, int]]) -> tuple[Timed, ...]:
    found, seen_product = [], False
    for name, operator, seconds, macs in calls:
        binary = operator in _BINARY
        seen_product |= binary
        part = ("binary" if binary else "stem" if not seen_product else
                "real" if operator in _REAL else "glue")
        found.append(Timed(name, operator, part, 1e3 * seconds, macs))
    return tuple(found)


class _Timing(fx.Interpreter):
    def __init__(self, network: Converted, device: torch.device) -> None:
        super().__init__(network.graph_module)
        self.network, self.device = network, device
        self.seconds: dict[fx.Node, float] = {}
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        self._wait()
        start = time.perf_counter()
        result = super().run_node(n)
        self._wait()
        self.seconds[n] = time.perf_counter() - start
        self.macs[n] = self._multiplied(n, result)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _multiplied(self, node: fx.Node, result: Any) -> int:
        if str(node.target) not in (*_BINARY, *_REAL):
            return 0
        given = arguments(node)
        if str(node.target) in _REAL:
            weight = self.env[given["weight"]]
            return result.numel() * (weight.numel() // weight.shape[0])
        words = self.env[given["words"]]
        filters = getattr(self.network.graph_module, _name(self.network, node)).shape[1:-1]
        taps = math.prod(filters)  # of a linear layer: ()
        channels = int(given["channels"]) // given.get("groups", 1)
        if node.target is ops.packed_conv_transpose2d.default:
            pixels = math.prod(words.shape[:-1])
            return pixels * taps * channels * result.shape[1]
        first = tree_leaves(result)[0]
        packed = first.dtype is torch.int32 and given.get("dtype") is not torch.int32
        outputs = (math.prod(first.shape[:-1]) * int(given["out_channels"]) if packed
                   else first.numel())
        return outputs * taps * channels


def _name(network: Converted, node: fx.Node) -> str:
    """The buffer of the state with a call's weight, or the call's own name."""
    weight = arguments(node).get("weight_words", arguments(node).get("weight"))
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        return network.words_of(str(weight.target))
    return node.name
