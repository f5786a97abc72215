"""What stays real: batch norms folded into their convolutions, and convolutions in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import Net, arguments, aten, norm_affine, only_user, ops, shape

_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_REAL_CONVS = (aten.conv2d.default,)
_PRODUCTS_OF_IMAGES = (ops.packed_conv2d.default, ops.packed_conv2d.both,
                       ops.packed_conv_transpose2d.default)


def fold_norms(net: Net) -> None:
    """A batch norm that alone reads a real convolution becomes a part of its weight and bias."""
    for conv in net.calls(*_CONVS):
        norm = only_user(conv)
        if norm is None or norm.target is not aten.batch_norm.default or norm.args[0] is not conv:
            continue
        given = arguments(conv)
        weight = net.value(given["weight"])
        bias = None if given["bias"] is None else net.value(given["bias"])
        affine = norm_affine(net, arguments(norm))
        if weight is None or affine is None or (bias is None) != (given["bias"] is None) or (
                len(shape(conv)) != weight.dim()):  # without a batch the norm's channels are others
            continue
        factor, offset = affine
        name = net.origin(given["weight"])
        folded = weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))
        if bias is not None:
            offset = offset + bias.double() * factor
        kept: dict[str, Any] = dict(given)
        kept.pop("input"), kept.pop("weight"), kept.pop("bias")
        conv.args = (given["input"], net.constant(folded.to(weight.dtype), name),
                     net.constant(offset.to(weight.dtype), f"{name}.bias"), *kept.values())
        conv.kwargs = {}
        norm.replace_all_uses_with(conv)
        net.graph.erase_node(norm)


def channels_last(net: Net) -> None:
    """Images channels-last throughout, which is the order of the words."""
    for node in list(net.graph.nodes):
        if node.op != "placeholder" or not node.users or not isinstance(
                node.meta.get("val"), Tensor) or node.meta["val"].dim() != 4 or (
                not node.meta["val"].is_floating_point()):
            continue
        users = list(node.users)
        with net.graph.inserting_after(node):
            ordered = net.graph.call_function(aten.contiguous.default, (node,), {
                "memory_format": torch.channels_last})
        ordered.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, ordered)
    for node in net.calls(*_REAL_CONVS):
        given = arguments(node)
        weight = net.value(given["weight"])
        if weight is not None:
            ordered = net.constant(weight.contiguous(memory_format=torch.channels_last),
                                   net.origin(given["weight"]))
            node.replace_input_with(given["weight"], ordered)
    for node in net.calls(*_PRODUCTS_OF_IMAGES):
        if "channels_last" in node.kwargs:
            node.kwargs = {**node.kwargs, "channels_last": True}


def in_bfloat16(net: Net) -> None:
    """Real convolutions and linear layers in bfloat16; what is between them stays as it is."""
    for node in net.calls(*_CONVS, aten.linear.default):
        given = arguments(node)
        if any(given[n] is not None and net.value(given[n]) is None for n in ("weight", "bias")):
            continue
        kind = node.meta["val"].dtype
        if kind is not torch.float32:
            continue
        for name in ("weight", "bias"):
            if given[name] is not None:
                value = net.value(given[name])
                assert value is not None
                given[name] = net.constant(value.bfloat16(), net.origin(given[name]))
        with net.graph.inserting_before(node):
            given["input"] = _cast(net, given["input"], torch.bfloat16)
        node.args, node.kwargs = tuple(given.values()), {}
        users = list(node.users)
        with net.graph.inserting_after(node):
            back = _cast(net, node, kind)
        for user in users:
            user.replace_input_with(node, back)
        back.meta["val"] = node.meta["val"]


def _cast(net: Net, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return net.graph.call_function(aten.to.dtype, (node, dtype))
