"""Several spellings of one computation become one, which the passes and the C++ engine know.

The values stay the same bit for bit.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from bitkernels.converter.net import Net, arguments, aten, dtype, is_call, new_call, shape
from bitkernels.ops.geometry import same_padding

_BROADCAST = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


def respell(net: Net) -> None:
    _drop_expansions(net)
    _number_paddings(net)
    _turn_differences(net)
    _say_types(net)
    for node in net.calls(*_PARTS):
        _slice_parts(net, node)
    for node in net.calls(aten.select.int):
        source, dim, index = (arguments(node)[name] for name in ("self", "dim", "index"))
        # Of a batch, an empty one has to fail as in the model.
        if isinstance(index, int) and isinstance(shape(source)[dim], int):
            net.replace(node, _one(net, node, source, dim, index))
    for node in net.calls(aten.channel_shuffle.default, aten.pixel_shuffle.default):
        _shuffle(net, node)


def _drop_expansions(net: Net) -> None:
    """x + bias.expand_as(x) is x + bias, also in other arithmetic that broadcasts."""
    for node in net.calls(aten.expand.default, aten.expand_as.default):
        source: Any = node.args[0]
        for user in list(node.users):
            if not is_call(user, *_BROADCAST):
                continue
            first, second = user.args[:2]
            other = second if first is node else first
            if (isinstance(other, fx.Node) and other is not node
                    and isinstance(other.meta.get("val"), Tensor) and shape(other) == shape(node)
                    and dtype(other) == dtype(node)):
                user.replace_input_with(node, source)


def _number_paddings(net: Net) -> None:
    """Padding by name becomes one in numbers, where it is the same on both sides."""
    for node in net.calls(aten.conv2d.padding):
        given = arguments(node)
        top, bottom, left, right = same_padding(
            "convert", given["padding"], given["weight"].meta["val"].shape[2:], given["stride"],
            given["dilation"])
        if top == bottom and left == right:
            given["padding"] = [top, left]
            node.target, node.args, node.kwargs = aten.conv2d.default, tuple(given.values()), {}


def _turn_differences(net: Net) -> None:
    """1 - x is -x + 1: exact, and a step that works on x alone."""
    for node in net.calls(aten.rsub.Scalar):
        given = arguments(node)
        if given["alpha"] == 1 and dtype(given["self"]).is_floating_point:
            turned = new_call(node, aten.neg.default, given["self"])
            net.replace(node, new_call(node, aten.add.Tensor, turned, given["other"]))


def _say_types(net: Net) -> None:
    """The type of another tensor by its name, so that a constant of it is one."""
    for node in net.calls(aten.type_as.default):
        source: Any = node.args[0]
        net.replace(node, source if dtype(source) == dtype(node) else new_call(
            node, aten._to_copy.default, source, dtype=dtype(node)))


def clamps_by_where(net: Net) -> None:
    """where(x > c, c, x) is a clamp, of a number that is not 0, whose sign a clamp may change.

    Called when constants are folded.
    """
    for node in net.calls(aten.where.self):
        condition, bound, value = node.args
        assert isinstance(value, fx.Node)
        for compare, name in ((aten.gt, "max"), (aten.lt, "min")):
            if not is_call(condition, compare.Tensor, compare.Scalar):
                continue
            of, limit = condition.args  # type: ignore[union-attr]
            found = net.value(bound)
            given = net.value(limit)
            if given is not None and given.numel() == 1:
                limit = float(given)
            if of is value and found is not None and found.numel() == 1 and (
                    float(found) == limit != 0 and dtype(value) == found.dtype
                    and found.is_floating_point() and shape(value) == shape(node)):
                net.replace(node, new_call(node, aten.clamp.default, value, **{name: float(found)}))
                break


def _slice_parts(net: Net, node: fx.Node) -> None:
    """Parts of a tensor, each a slice of it."""
    given = arguments(node)
    source, dim = given["self"], given["dim"]
    parts, users = node.meta["val"], list(node.users)
    single = node.target is aten.unbind.int
    sizes = [1 if single else part.shape[dim] for part in parts]
    if not all(isinstance(n, int) for n in (*sizes, shape(source)[dim])) or not all(
            is_call(user, operator.getitem) for user in users):
        return
    for user in users:
        index = int(user.args[1]) % len(sizes)  # type: ignore[arg-type]
        start = sum(sizes[:index])
        net.replace(user, _one(net, user, source, dim, index) if single else new_call(
            user, aten.slice.Tensor, source, dim, start, start + sizes[index]))
    net.graph.erase_node(node)


def _one(net: Net, node: fx.Node, source: Any, dim: Any, index: int) -> fx.Node:
    """What is at one index along a dimension."""
    end = index + 1 if index != -1 else None
    return new_call(node, aten.squeeze.dim,
                 new_call(node, aten.slice.Tensor, source, dim, index, end), dim)


def _shuffle(net: Net, node: fx.Node) -> None:
    """Shuffled channels, and pixels made of channels, by reshaping."""
    source, factor = arguments(node).values()
    sizes = shape(source)
    if len(sizes) != 4 or not all(isinstance(n, int) for n in sizes[1:]):
        return
    channels, height, width = sizes[1:]
    batch = sizes[0] if isinstance(sizes[0], int) else new_call(node, aten.sym_size.int, source, 0)
    if node.target is aten.channel_shuffle.default:
        apart, order = [factor, channels // factor, height, width], [0, 2, 1, 3, 4]
    else:
        apart = [channels // factor**2, factor, factor, height, width]
        order = [0, 1, 4, 2, 5, 3]
    moved = new_call(node, aten.permute.default,
                  new_call(node, aten.reshape.default, source, [batch, *apart]), order)
    net.replace(node, new_call(node, aten.reshape.default, moved, [batch, *shape(node)[1:]]))
