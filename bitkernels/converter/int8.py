"""Real convolutions and linear layers in int8, with static symmetric steps.

Weights have a step for each output channel, max |weight| / 127; the activations that a layer reads
have one, the largest magnitude in the example inputs / 127.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import Net, arguments, aten, ops, shape
from bitkernels.converter.report import IN_INT8
from bitkernels.ops._int8 import MOST_PRODUCTS
from bitkernels.ops.geometry import same_padding

_LAYERS = (aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
           aten.linear.default)
FEWEST_CHANNELS = 16  # of a group: rounding the input costs more than fewer products save
_LEAST = 1e-36  # of the largest activation: below it the steps are no float32 number


def in_int8(net: Net, inputs: Sequence[Any], reasons: dict[fx.Node, str]) -> None:
    """Layers in int8, calibrated by a run on the inputs; `reasons` says what became of each.

    Raises ValueError where a layer's input is all 0 or not finite.
    """
    layers = []
    for node in net.calls(*_LAYERS):
        why = _why_not(net, node)
        if why is None:
            layers.append(node)
        else:
            kind = str(node.meta["val"].dtype).removeprefix("torch.")
            reasons[node] = f"{reasons.get(node, 'a real layer')}, in {kind}: {why}"
    reads = [(node, arguments(node)["input"]) for node in layers]  # layers that are replaced below
    largest = _Calibration(net, {source for _, source in reads}).run_on(inputs)
    for node, source in reads:
        given = arguments(node)
        name, most = net.origin(given["weight"]), largest[source]
        if not _LEAST <= most < math.inf:
            raise ValueError(
                f'convert: real="int8" takes its steps from example_inputs, in which the input of '
                f"{name} is {'not finite' if most >= _LEAST or math.isnan(most) else 'all 0'}; "
                "give real images")
        reasons[_replace(net, node, given, name, most)] = f"{IN_INT8}, its input within {most:.4g}"


def _why_not(net: Net, node: fx.Node) -> str | None:
    given = arguments(node)
    weight = net.value(given["weight"])
    if weight is None or (given["bias"] is not None and net.value(given["bias"]) is None):
        return "its weight is computed from the input"
    conv = node.target is not aten.linear.default
    if node.meta["val"].dtype is not torch.float32:
        return "layers in int8 read and give float32"
    if conv and (weight.dim() != 4 or len(shape(given["input"])) != 4):
        return "no convolution of a batch of images"
    if weight.shape[1] < FEWEST_CHANNELS:
        return (f"{weight.shape[1]} input channels" + (" a group" if conv else "")
                + f", less than {FEWEST_CHANNELS}")
    if weight.shape[1:].numel() > MOST_PRODUCTS:
        return f"sums of more than {MOST_PRODUCTS} products"
    return None if bool(weight.isfinite().all()) else "its weight is not finite"


def _replace(net: Net, node: fx.Node, given: dict[str, Any], name: str, most: float) -> fx.Node:
    weight: Any = net.value(given["weight"])
    around = (-1, *[1] * (weight.dim() - 1))
    step = weight.double().abs().flatten(1).amax(1) / 127
    step[step == 0] = 1
    filters = (weight.double() / step.view(around)).round().to(torch.int8)
    # The steps that the kernel multiplies by are rounded to float32, and what they are worth too.
    steps = torch.tensor(127 / most, dtype=torch.float32, device="cpu").double().item()
    constants = (net.constant(filters.contiguous(), name),
                 net.constant((step / steps).float(), f"{name}.scale"), given["bias"])
    with net.graph.inserting_before(node):
        if node.target is aten.linear.default:
            made = net.graph.call_function(ops.int8_linear.default, (
                given["input"], *constants, steps))
        else:
            padding = given["padding"]
            if isinstance(padding, str):
                padding = same_padding("convert", padding, weight.shape[2:], given["stride"],
                                       given["dilation"])
            made = net.graph.call_function(ops.int8_conv2d.default, (
                given["input"], *constants, steps, list(given["stride"]), list(padding),
                list(given["dilation"]), given["groups"]))
    net.replace(node, made)
    return made


class _Calibration(fx.Interpreter):
    """The largest magnitude of what each layer reads."""

    def __init__(self, net: Net, inputs: set[fx.Node]) -> None:
        super().__init__(net.module)
        self.largest: dict[fx.Node, float] = {}
        self.inputs = inputs

    def run_on(self, inputs: Sequence[Any]) -> dict[fx.Node, float]:
        with torch.no_grad():
            self.run(*inputs, enable_io_processing=False)
        return self.largest

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.inputs:
            assert isinstance(result, Tensor)
            self.largest[n] = float(result.abs().max()) if result.numel() else 0.0
        return result
