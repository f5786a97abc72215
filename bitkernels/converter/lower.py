"""Binary operators of training become products of packed bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from bitkernels.converter.net import (
    CONV,
    LINEAR,
    PRODUCTS,
    Net,
    arguments,
    aten,
    dtype,
    ops,
    shape,
)
from bitkernels.ops.binary_conv_transpose2d import by_output
from bitkernels.ops.geometry import same_padding, wants_channels_last

_SIGN_PACK = ops.sign_pack.default
_CONVS = (ops.binary_conv2d.default, ops.binary_conv2d.padding)


def lower(net: Net) -> None:
    """`binary_conv2d`, `binary_linear` and `binary_conv_transpose2d` with constant weights become
    `sign_pack` and a packed product; weights are packed now."""
    for node in list(net.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (*_CONVS, ops.binary_linear.default):
            _lower(net, node)
        elif node.target is ops.binary_conv_transpose2d.default:
            _lower_transposed(net, node)
    for node in net.calls(*PRODUCTS):
        node.args, node.kwargs = (), arguments(node)


def _words(net: Net, weight: fx.Node) -> fx.Node | None:
    real = net.value(weight)
    if real is None:
        return None
    return net.constant(_SIGN_PACK(real, None, 1), net.origin(weight))


def _lower(net: Net, node: fx.Node) -> None:
    given = arguments(node)
    conv = node.target in _CONVS
    weight = given["weight"]
    words = _words(net, weight)
    if words is None or given["bias"] is not None and net.value(given["bias"]) is None:
        return
    input = _batched(net, node, given) if conv else given["input"]
    kept = dict(scale=given["scale"], bias=given["bias"],
                dtype=given["dtype"] or dtype(node))
    if conv:
        kept |= {name: given[name] for name in ("stride", "padding", "dilation", "groups",
                                                "pad_value")}
        if isinstance(kept["padding"], str):
            kept["padding"] = same_padding("binary_conv2d", kept["padding"],
                                           weight.meta["val"].shape[2:], kept["stride"],
                                           kept["dilation"])
        kept["channels_last"] = wants_channels_last(input.meta["val"], weight.meta["val"])
    with net.graph.inserting_before(node):
        signs = net.graph.call_function(_SIGN_PACK, (input, None, 1 if conv else -1))
        signs.meta["val"] = _fake(_SIGN_PACK, input.meta["val"], None, 1 if conv else -1)
        # The weight's, since the input's may be an expression of the image's free sizes.
        out_channels, per_group = weight.meta["val"].shape[:2]
        made = net.graph.call_function(CONV if conv else LINEAR, (), dict(
            words=signs, weight_words=words, out_channels=out_channels,
            channels=per_group * (given["groups"] if conv else 1), **kept))
    _replace(net, node, made, input is not given["input"])


def _lower_transposed(net: Net, node: fx.Node) -> None:
    given = arguments(node)
    weight, groups = net.value(given["weight"]), given["groups"]
    if weight is None:
        return
    words = net.constant(_SIGN_PACK(by_output(weight, groups), None, 1),
                         net.origin(given["weight"]))
    input = _batched(net, node, given)
    with net.graph.inserting_before(node):
        signs = net.graph.call_function(_SIGN_PACK, (input, None, 1))
        signs.meta["val"] = _fake(_SIGN_PACK, input.meta["val"], None, 1)
        made = net.graph.call_function(ops.packed_conv_transpose2d.default, (
            signs, words, weight.shape[0], given["stride"], given["padding"],
            given["output_padding"], groups, given["dilation"]), dict(
            scale=given["scale"], bias=given["bias"], dtype=given["dtype"] or dtype(node),
            channels_last=wants_channels_last(input.meta["val"], weight)))
    _replace(net, node, made, input is not given["input"])


def _batched(net: Net, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """The input of a convolution as a batch; packed operators take no single image."""
    input = given["input"]
    if len(shape(input)) == 4:
        return input
    with net.graph.inserting_before(node):
        batch = net.graph.call_function(aten.unsqueeze.default, (input, 0))
    batch.meta["val"] = _fake(aten.unsqueeze.default, input.meta["val"], 0)
    return batch


def _replace(net: Net, node: fx.Node, made: fx.Node, single: bool) -> None:
    """A product in place of a convolution, of a single image by a step behind it."""
    if single:
        made.meta["val"] = _fake(aten.unsqueeze.default, node.meta["val"], 0)
        with net.graph.inserting_before(node):
            made = net.graph.call_function(aten.squeeze.dim, (made, 0))
    net.replace(node, made)


def _fake(op, value: Tensor, *rest) -> Tensor:
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return op(value, *rest)
    with mode:
        return op(value, *rest)
