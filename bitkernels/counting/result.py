"""The rows and totals of a summary, and how they are printed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One layer, or several that were joined.

    name: in `model.named_modules()`; "" is the model itself. kind: its class.
    calls: in one run; 0 where its weights are there and it is not called.
    input_bits: of its first input: 1 where the layer takes signs, k after a DoReFa quantizer, else
      those of the tensor (32 for float32).
    output_shapes: of the last call, of each tensor that it returned.
    weights: {bits: how many}, as Larq counts them.
    macs: {bits: multiply-adds of all calls}, by the wider operand; None where not known.
    fixed_macs: those of them without a learned weight, as a blur or attention.
    """

    name: str
    kind: str
    calls: int
    input_bits: int | None
    output_shapes: tuple[tuple[int, ...], ...]
    weights: dict[int, int]
    macs: dict[int, int] | None
    fixed_macs: dict[int, int]

    @property
    def bytes(self) -> int:
        """With each weight in its own bits, and a byte that is begun taken whole."""
        return math.ceil(_bits(self.weights) / 8)


@dataclass(frozen=True)
class LarqTotals:
    """As `larq.models.summary` defines them.

    weights: of all bits; a norm with running statistics has two a channel (mean with shift,
      variance with scale), fixed filters are weights. bytes: each in its own bits. bytes_8bit:
      those wider than 8 in 8. bytes_float32: all in 32. compression: bytes / bytes_float32.
    macs: of all bits, those of fixed filters too. binarized: the part of macs that is 1-bit;
      ternarized: 2-bit.
    """

    weights: int
    bytes: int
    bytes_8bit: int
    bytes_float32: int
    compression: float
    macs: int
    binarized: float
    ternarized: float


@dataclass(frozen=True)
class Operations:
    """Operations of one run as a paper counts them: those of convolutions and linear layers.

    bops: multiply-adds of two signs. flops: all others with learned weights.
    ops: what the paper calls OPs.
    """

    bops: int
    flops: int
    ops: float


@dataclass(frozen=True)
class Summary:
    """What `bitkernels.summary` found; `print` shows it as a table.

    input_shapes: of the tensors that the model was given, with the batch.
    layers: in the order of their first call, then those that are not called.
    parameters: learned numbers. values: with running statistics and fixed filters, as Keras counts.
      The factor of a binary layer's weights is counted nowhere, for it follows from them.
    uncounted: {name of a layer: operators in it that may multiply by weights and are not known}.
    """

    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    layers: tuple[Layer, ...]
    parameters: int
    values: int
    uncounted: dict[str, tuple[str, ...]]

    @property
    def weights(self) -> dict[int, int]:
        """{bits: how many} of all layers, as Larq counts them."""
        return _sum(layer.weights for layer in self.layers)

    @property
    def macs(self) -> dict[int, int]:
        """{bits: multiply-adds} of all layers, without what is `uncounted`."""
        return _sum(layer.macs or {} for layer in self.layers)

    @property
    def fixed_macs(self) -> dict[int, int]:
        """Those of them without a learned weight."""
        return _sum(layer.fixed_macs for layer in self.layers)

    @property
    def larq(self) -> LarqTotals:
        """Totals as `larq.models.summary` of Larq 0.13 defines them."""
        weights, macs = self.weights, self.macs
        count, products = sum(weights.values()), sum(macs.values())
        return LarqTotals(
            count, math.ceil(_bits(weights) / 8),
            math.ceil(sum(min(bits, 8) * n for bits, n in weights.items()) / 8), 4 * count,
            _bits(weights) / max(1, 32 * count), products, macs.get(1, 0) / max(1, products),
            macs.get(2, 0) / max(1, products))

    @property
    def reactnet(self) -> Operations:
        """OPs = FLOPs + BOPs / 64, a real multiply-add one operation (Bi-Real Net, ReActNet)."""
        bops, flops = self._products()
        return Operations(bops, flops, flops + bops / 64)

    @property
    def bnext(self) -> Operations:
        """OPs = MACs / 8 + BOPs / 64, all that is not binary taken as 8-bit (BNext)."""
        bops, flops = self._products()
        return Operations(bops, flops, flops / 8 + bops / 64)

    def _products(self) -> tuple[int, int]:
        macs, fixed = self.macs, self.fixed_macs
        learned = sum(macs.values()) - sum(fixed.values())
        return macs.get(1, 0), learned - macs.get(1, 0)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types that JSON has; bits become strings."""
        layers = [{**asdict(layer), "output_shapes": [list(s) for s in layer.output_shapes],
                   "weights": _keyed(layer.weights),
                   "bytes": layer.bytes, "fixed_macs": _keyed(layer.fixed_macs),
                   "macs": None if layer.macs is None else _keyed(layer.macs)}
                  for layer in self.layers]
        return {"model": self.model, "input_shapes": [list(s) for s in self.input_shapes],
                "layers": layers, "parameters": self.parameters, "values": self.values,
                "weights": _keyed(self.weights), "macs": _keyed(self.macs),
                "fixed_macs": _keyed(self.fixed_macs), "larq": asdict(self.larq),
                "reactnet": asdict(self.reactnet), "bnext": asdict(self.bnext),
                "uncounted": {name: list(ops) for name, ops in self.uncounted.items()}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        inputs = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        return "\n".join([f"{self.model}, input {inputs}", "", *self._table(), "", *self._totals()])

    def _table(self) -> list[str]:
        wide = sorted(self.weights)
        widths = sorted(self.macs) or [32] * bool(self.uncounted)
        rows = [["layer", "kind", "in", "output", *(f"{bits}-bit" for bits in wide), "bytes",
                 *(f"{bits}-bit MACs" for bits in widths)]]
        for layer in self.layers:
            shape = " ".join("x".join(map(str, s)) or "()" for s in layer.output_shapes) or "?"
            calls = {0: "not called", 1: shape}.get(layer.calls, f"{layer.calls} of {shape}")
            products = ["?" if layer.macs is None else f"{layer.macs.get(bits, 0):,}"
                        for bits in widths]
            rows.append([layer.name or "(itself)", layer.kind, str(layer.input_bits or "-"), calls,
                         *(f"{layer.weights.get(bits, 0):,}" for bits in wide),
                         f"{layer.bytes:,}", *products])
        rows.append(["total", "", "", "", *(f"{n:,}" for _, n in sorted(self.weights.items())),
                     f"{self.larq.bytes:,}", *(f"{self.macs.get(bits, 0):,}" for bits in widths)])
        return aligned(rows, left=(0, 1, 3))

    def _totals(self) -> list[str]:
        larq, reactnet, bnext = self.larq, self.reactnet, self.bnext
        fixed = sum(self.fixed_macs.values())
        rows = [
            ["parameters", f"{self.parameters:,}; {self.values:,} with running statistics and "
                           "fixed filters"],
            ["size", f"{_size(larq.bytes)}; {_size(larq.bytes_8bit)} with the real weights in 8 "
                     f"bits; {_size(larq.bytes_float32)} with all in float32 (ratio "
                     f"{larq.compression:.4f})"],
            ["MACs", f"{larq.macs:,}; {larq.binarized:.2%} of them 1-bit"
                     + (f"; {fixed:,} without a learned weight" if fixed else "")],
            ["OPs, ReActNet's", f"{reactnet.ops:.4g} = {reactnet.flops:.4g} FLOPs + "
                                f"{reactnet.bops:.4g} BOPs / 64"],
            ["OPs, BNext's", f"{bnext.ops:.4g} = {bnext.flops:.4g} MACs / 8 + "
                             f"{bnext.bops:.4g} BOPs / 64"]]
        if self.uncounted:
            rows.append(["not counted", "; ".join(
                f"{name or '(itself)'}: {', '.join(ops)}" for name, ops in self.uncounted.items())])
        return aligned(rows, left=(0, 1))


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of columns two spaces apart, those in `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]


def _size(count: int) -> str:
    """Of bytes."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 1024:.2f} KiB"


def _bits(weights: dict[int, int]) -> int:
    return sum(bits * count for bits, count in weights.items())


def _sum(counts: Iterable[dict[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _keyed(counts: dict[int, int]) -> dict[str, int]:
    return {str(bits): count for bits, count in sorted(counts.items())}
