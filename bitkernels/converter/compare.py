"""A converted network against its model: outputs, and every sign that a product of bits reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from bitkernels.converter.capture import capture, neutral
from bitkernels.converter.converted import Converted
from bitkernels.converter.lower import lower
from bitkernels.converter.net import PRODUCTS, WITH_WORDS, Net, arguments, is_call, ops
from bitkernels.converter.recognise import recognise

NEAR = 1e-5
_TRANSPOSED = ops.packed_conv_transpose2d.default


@dataclass(frozen=True)
class Signs:
    """The signs that a product of bits reads, by the name of its weight.

    signs: how many were compared. different: how many of them differ from the model's. far: those
    of them whose real value is not within 1e-5 of the threshold, relative to the largest value;
    a right conversion has none, but behind layers in int8.
    """

    name: str
    signs: int
    different: int
    far: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    largest: the largest difference of an output over the largest output.
    given_signs: the same where every product reads the model's signs: what a sign at its threshold
      does to all that follows is left out, so a right conversion has float32 rounding here.
    products: each product in the network's order, its signs compared, it and those before it given
      the model's.
    uncompared: products whose words stand in another order than the model's.
    """

    largest: float
    given_signs: float
    products: tuple[Signs, ...]
    uncompared: tuple[str, ...]

    @property
    def far(self) -> int:
        return sum(p.far for p in self.products)

    def __str__(self) -> str:
        count, different = (sum(getattr(p, key) for p in self.products)
                            for key in ("signs", "different"))
        lines = [f"outputs differ by {self.largest:.1e} of the largest, by {self.given_signs:.1e} "
                 f"given the model's signs; {different:,} of {count:,} signs differ, {self.far:,} "
                 "of them away from the threshold"]
        lines += [f"  {p.name}: {p.different:,} of {p.signs:,}, {p.far:,} away"
                  for p in self.products if p.different]
        lines += [f"  {name}: not compared, its words are in another order"
                  for name in self.uncompared]
        return "\n".join(lines)


def compare(model: nn.Module, network: Converted, *inputs: Any,
            sign_of_zero: int | None = None) -> Comparison:
    """Run a model, in evaluation, and what `convert` made of it on these inputs, and compare.

    sign_of_zero: as it was given to `convert`.

    Raises ValueError for another module than what `convert` returns, and for a model that is not
    the one that was converted: other products of bits.
    """
    if not isinstance(network, Converted):
        raise ValueError("compare: network must be what bitkernels.convert(model) returns, got "
                         f"{type(network).__name__}")
    with neutral():
        net = capture(model, inputs, None)
        evaluated = copy.deepcopy(model).eval()  # what was converted; statistics stay as they are
        wanted, got = tree_leaves(evaluated(*inputs)), tree_leaves(network(*inputs))
        recognise(net, sign_of_zero)
        lower(net)
        expected = _Expected(net)
        expected.run(*tree_leaves((inputs, {})))
        names = [p.name for p in network.report.products]
        if sorted(names) != sorted(expected.names):
            raise ValueError("compare: model must be the one that network was converted from; it "
                             f"has the products {expected.names}, network has {names}"
                             + ("; give sign_of_zero=1 where convert got it"
                                if sign_of_zero is None and len(names) > len(expected.names)
                                else ""))
        compared = _Compared(network, expected, names)
        given_signs = tree_leaves(compared.run(*tree_leaves((inputs, {}))))
    return Comparison(_largest(got, wanted), _largest(given_signs, wanted),
                      tuple(compared.found), tuple(compared.skipped))


def _largest(got: list[Any], wanted: list[Any]) -> float:
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
                for a, b in zip(got, wanted, strict=True)
                if isinstance(b, Tensor) and b.is_floating_point() and b.numel()), default=0.0)


@dataclass
class _Read:
    """What a product of the model reads: its words and filters, and the real values behind them."""

    words: Tensor
    filters: Tensor
    distance: Tensor  # |value - threshold| over the largest value, shaped as the value
    dim: int
    groups: int


class _Expected(fx.Interpreter):
    """Runs the model's graph, its products lowered to bits and nothing moved."""

    def __init__(self, net: Net) -> None:
        net.clean()
        super().__init__(net.module, garbage_collect_values=False)
        self.net, self.names = net, [net.origin(arguments(n)["weight_words"])
                                     for n in net.calls(*PRODUCTS, _TRANSPOSED)]
        self.reads: dict[str, list[_Read]] = {}

    def run_node(self, n: fx.Node) -> Any:
        product = arguments(n) if is_call(n, *PRODUCTS, _TRANSPOSED) else {}
        words: Any = product.get("words")
        if is_call(words, ops.sign_pack.default):  # else words that the model itself made
            filters: Any = product["weight_words"]
            given = arguments(words)
            value, shift = self.env[given["input"]], given["shift"]
            source = given["input"]
            if shift is None and is_call(source, ops.rsign.default):
                inner = arguments(source)
                value = self.env[inner["input"]]
                value = value + self.env[inner["shift"]].view(-1, *[1] * (value.dim() - 2))
            elif shift is not None:
                value = value + self.env[shift].view(-1, *[1] * (value.dim() - given["dim"] - 1))
            distance = value.abs() / value.abs().max().clamp_min(1e-30)
            self.reads.setdefault(self.net.origin(filters), []).append(_Read(
                self.env[words], self.env[filters], distance, given["dim"],
                product.get("groups", 1)))
        return super().run_node(n)


class _Compared(fx.Interpreter):
    """Runs the converted graph, and gives each product the model's signs."""

    def __init__(self, network: Converted, expected: _Expected, names: list[str]) -> None:
        super().__init__(network.graph_module, garbage_collect_values=False)
        self.network, self.expected, self.names = network, expected, list(names)
        self.found: list[Signs] = []
        self.skipped: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        if not is_call(n, *WITH_WORDS, _TRANSPOSED):
            return super().run_node(n)
        name, given = self.names.pop(0), arguments(n)
        filters = getattr(self.network.graph_module, self.network.words_of(
            str(given["weight_words"].target)))
        own = self.env[given["words"]]
        reads = self.expected.reads.get(name, [])
        # Of several products with one weight, which may stand in another order here, the nearest.
        found = min((f for f in (_signs(read, name, filters, own) for read in reads) if f),
                    key=lambda f: f[0].different, default=None)
        if found is None:
            self.skipped.append(name)
            return super().run_node(n)
        signs, wanted, read = found
        reads[:] = [other for other in reads if other is not read]
        self.found.append(signs)
        self.env[given["words"]] = wanted
        result = super().run_node(n)
        self.env[given["words"]] = own
        return result


def _signs(read: _Read, name: str, filters: Tensor, own: Tensor
           ) -> tuple[Signs, Tensor, _Read] | None:
    """How a product's words differ from what the model's reads, and the words that it should have;
    None where they stand in another order."""
    if filters.shape != read.filters.shape or own.shape != read.words.shape:
        return None
    turned = _turned(filters ^ read.filters, read.groups)
    if turned is None:
        return None
    wanted = read.words ^ turned
    channels = read.distance.shape[read.dim]
    bits = ops.unpack(own ^ wanted, channels, torch.float32, read.dim) > 0
    signs = Signs(name, bits.numel(), int(bits.sum()), int((bits & (read.distance > NEAR)).sum()))
    return signs, wanted, read


def _turned(changed: Tensor, groups: int) -> Tensor | None:
    """The input's words with a bit for each channel that was turned around, from how the filters
    changed; None where they did so in another way."""
    if not bool(changed.any()):
        return changed.new_zeros(1)
    rows = changed.reshape(-1, changed.shape[-1])
    return rows[0] if groups == 1 and bool((rows == rows[0]).all()) else None
