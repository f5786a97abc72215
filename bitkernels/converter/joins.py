"""Per-channel steps behind a concatenation of products, taken in front of it."""

from __future__ import annotations

from typing import Any

from torch import fx

from bitkernels.converter.net import (
    PRODUCTS,
    Net,
    arguments,
    aten,
    channels_second,
    is_call,
    only_user,
    ops,
    shape,
)

# What works on each channel alone, with constants that are vectors of the channels.
_PER_CHANNEL = (aten.relu.default, aten.prelu.default, aten.leaky_relu.default,
                aten.hardtanh.default, aten.batch_norm.default, ops.rprelu.default)


def split_joins(net: Net) -> bool:
    """f(cat(a, b)) = cat(f(a), f(b)), where a and b are products that f can join; whether any."""
    changed = False
    for cat in net.calls(aten.cat.default):
        given = arguments(cat)
        user, parts = only_user(cat), list(given["tensors"])
        if given["dim"] not in (1, -3) or user is None or not is_call(user, *_PER_CHANNEL):
            continue
        sizes = [shape(part)[1] for part in parts]
        if user.args[0] is not cat or not all(isinstance(n, int) for n in sizes) or not all(
                is_call(part, *PRODUCTS) and channels_second(part) and only_user(part) is cat
                for part in parts):
            continue
        columns = [_split(net, arg, sizes) for arg in user.args[1:]]
        if any(c is None for c in columns):
            continue
        made = []
        for i, part in enumerate(parts):
            with net.graph.inserting_before(user):
                step: Any = user.target
                node = net.graph.call_function(
                    step, (part, *(c[i] for c in columns if c is not None)), user.kwargs)
            node.meta["val"] = part.meta["val"]
            made.append(node)
        with net.graph.inserting_before(user):
            joined = net.graph.call_function(aten.cat.default, (made, 1))
        joined.meta["val"] = user.meta["val"]
        net.replace(user, joined)
        net.graph.erase_node(cat)
        changed = True
    return changed


def _split(net: Net, argument: Any, sizes: list[int]) -> list[Any] | None:
    """An argument for each part: slices of a vector of channels, anything else as it is."""
    if not isinstance(argument, fx.Node):
        return [argument] * len(sizes)
    value = net.value(argument)
    if value is None:
        return None
    if value.numel() == 1:
        return [argument] * len(sizes)
    if value.dim() != 1 or len(value) != sum(sizes):
        return None
    return [net.constant(t.contiguous(), net.origin(argument)) for t in value.split(sizes)]
