"""What a conversion did, product by product, and what stayed real and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import CONV, INT8, LINEAR, Net, arguments, aten, is_call, ops

_PRODUCTS: dict[Any, str] = {
    **dict.fromkeys((CONV, ops.packed_conv2d.packed, ops.packed_conv2d.both), "conv2d"),
    **dict.fromkeys((LINEAR, ops.packed_linear.packed, ops.packed_linear.both), "linear"),
    ops.packed_conv_transpose2d.default: "conv_transpose2d"}
_STEPS = {"clamp_min": "clamp", "clamp_max": "clamp", "scale": "scale", "bias": "bias",
          "residual": "residual", "slope": "activation", "threshold": "threshold"}
_MULTIPLIES = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
               aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default,
               aten.conv2d.padding, *INT8)
IN_INT8 = "in int8"  # the reasons of such layers begin so
_LATENT = {ops.binary_conv2d.default: "its weight is computed from the input",
           ops.binary_linear.default: "its weight is computed from the input",
           ops.binary_conv_transpose2d.default: "its weight is computed from the input"}


@dataclass(frozen=True)
class Product:
    """A product of bits: the parameter it was made of, and what its one call does.

    reads: "signs" of a real tensor, packed on the way in, or "words" that another call wrote.
    epilogue: the steps in it, of clamp, scale, bias, residual, activation and threshold.
    writes: "real", "words" or "both".
    """

    name: str
    kind: str
    reads: str
    epilogue: tuple[str, ...]
    writes: str


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did.

    products: the products of bits, in the order of their calls.
    real: (parameter or operator, why) of what computes on real numbers though it multiplies.
    others: how often each other operator is called, the most frequent first.
    bytes_before, bytes_after: of the parameters and buffers.
    """

    products: tuple[Product, ...]
    real: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, int], ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{len(self.products)} products of bits, {len(self.real)} real; "
                 f"{self.bytes_before:,} bytes became {self.bytes_after:,}"]
        width = max((len(p.name) for p in self.products), default=0)
        lines += [f"  {p.name:{width}}  {p.kind}: "
                  + " -> ".join((p.reads, ", ".join(p.epilogue) or "as it is", p.writes))
                  for p in self.products]
        lines += [f"  real: {name}: {why}" for name, why in self.real]
        if any(why.startswith(IN_INT8) for _, why in self.real):
            lines.append("  values of int8 layers are approximate, signs near their thresholds may "
                         "change: bitkernels.converter.compare counts them")
        if self.others:
            lines.append("  between them: " + ", ".join(f"{n} {name}" for name, n in self.others))
        return "\n".join(lines)


def report(net: Net, bytes_before: int, reasons: dict[fx.Node, str]) -> ConvertReport:
    products, real = [], []
    others: Counter[str] = Counter()
    for node in net.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _PRODUCTS:
            products.append(_product(net, node))
        elif node.target in _LATENT:
            real.append((net.origin(arguments(node)["weight"]), _LATENT[node.target]))
        elif node.target in _MULTIPLIES:
            weights = [n for n in node.all_input_nodes if net.value(n) is not None]
            name = net.origin(weights[0]) if weights else node.name
            real.append((name, reasons.get(node) or (
                "a real layer" if weights else "a product of two activations")))
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            real.append((node.name, "a graph inside the graph, under a condition or autocast, is "
                                    "left as it is"))
        elif hasattr(node.target, "overloadpacket"):
            others[str(node.target.overloadpacket).removeprefix("aten.")] += 1
    return ConvertReport(tuple(products), tuple(real), tuple(others.most_common()), bytes_before,
                         sum(t.numel() * t.element_size() for t in constants(net)))


def constants(net: Net) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for node in net.graph.nodes:
        value = net.value(node)
        if value is not None:
            found[id(value.untyped_storage())] = value
    return list(found.values())


def _product(net: Net, node: fx.Node) -> Product:
    given: dict[str, Any] = arguments(node)
    words = given["words"]
    overload = node.target._overloadname  # type: ignore[union-attr]
    steps = tuple(dict.fromkeys(step for key, step in _STEPS.items() if given.get(key) is not None))
    return Product(net.origin(given["weight_words"]), _PRODUCTS[node.target],
                   "signs" if is_call(words, ops.sign_pack.default) else "words", steps,
                   {"packed": "words", "both": "both"}.get(overload, "real"))
