"""Products of signs in code that computes them on real numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import CONV, LINEAR, Net, arguments, aten, dtype, is_call, ops, shape

# Of a channel's magnitude: what rounding in float32 leaves of straight-through forms whose result
# was stored. Types that round more coarsely have the step between two of their numbers.
TOLERANCE = 1e-5
_PACK = ops.sign_pack.default
_OF_SIGNS = (ops.binary_conv2d.default, ops.binary_conv2d.padding, ops.binary_linear.default,
             ops.binary_conv_transpose2d.default)  # which take the sign of their input
_SAME = (aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default,
         aten.lift_fresh_copy.default)
_FULL = {aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0}
_TAKE = "convert(..., sign_of_zero=1) takes it as +1"
ZERO_IS_0 = f"torch.sign(0) is 0, which no bit can say; {_TAKE}"
ZERO_IS_MINUS = f"its sign of 0 is -1, that of bits +1; {_TAKE}"


def recognise(net: Net, sign_of_zero: int | None) -> dict[fx.Node, str]:
    """Real convolutions and linear layers of signs with weights of one magnitude a channel become
    products of bits, that magnitude their scale. Returns why others did not, though they look so.

    Signs are torch.sign, where(x >= 0, 1, -1), 2 (x >= 0) - 1 and their like, also inside the
    straight-through forms (sign(x) - y) + y and sign(x) + (y - y). Binary operators read x itself.
    """
    reasons: dict[fx.Node, str] = {}
    for pack in net.calls(*_OF_SIGNS):
        input: Any = pack.args[0]
        found = _sign(net, input)
        if found is not None and found[1] == 1 and shape(found[0]) == shape(input) and (
                dtype(found[0]) == dtype(input)):
            pack.args = (found[0], *pack.args[1:])
    for node in net.calls(aten.conv2d.default, aten.conv2d.padding, aten.linear.default):
        given = arguments(node)
        weight, found = net.value(given["weight"]), _sign(net, given["input"])
        if weight is None or found is None or not weight.is_floating_point():
            continue
        scale = _magnitudes(weight)
        if isinstance(scale, str):
            if scale:
                reasons[node] = scale
            continue
        source, at_zero = found
        if (not source.meta["val"].is_floating_point() or shape(source) != shape(given["input"])
                or node.target is not aten.linear.default and len(shape(source)) != 4):
            continue
        if at_zero != 1 and sign_of_zero is None:
            reasons[node] = ZERO_IS_0 if at_zero == 0 else ZERO_IS_MINUS
            continue
        if isinstance(given.get("padding"), str) or (
                given["bias"] is not None and net.value(given["bias"]) is None):
            continue
        _replace(net, node, given, source, weight, scale)
    net.graph.eliminate_dead_code()  # what only the real forms of signs read
    return reasons


def _replace(net: Net, node: fx.Node, given: dict[str, Any], source: fx.Node, weight: Tensor,
             scale: Tensor) -> None:
    conv = node.target is aten.conv2d.default
    dim, name = 1 if conv else -1, net.origin(given["weight"])
    kept: dict[str, Any] = {}
    if conv:
        kept = {key: given[key] for key in ("stride", "padding", "dilation", "groups")}
        kept |= dict(pad_value=0, channels_last=False)
    factor = None if bool((scale == 1).all()) else net.constant(scale, f"{name}.scale")
    with net.graph.inserting_before(node):
        signs = net.graph.call_function(_PACK, (source, None, dim))
        made = net.graph.call_function(CONV if conv else LINEAR, (), dict(
            words=signs, weight_words=net.constant(_PACK(weight, None, 1), name),
            channels=int(source.meta["val"].shape[dim]), out_channels=weight.shape[0],
            scale=factor, bias=given["bias"], dtype=dtype(node), **kept))
    with source.meta["val"].fake_mode:
        signs.meta["val"] = _PACK(source.meta["val"], None, dim)
    net.replace(node, made)


def _magnitudes(weight: Tensor) -> Tensor | str:
    """The magnitude of each output channel's weights, if they have but one; else why not, in words
    where they look as if they should have."""
    sizes = weight.double().abs().flatten(1)
    least, most = sizes.amin(1), sizes.amax(1)
    if bool((most - least <= max(TOLERANCE, torch.finfo(weight.dtype).eps) * most).all()):
        return ((least + most) / 2).float()
    if bool(((sizes == 0) | (sizes == most[:, None])).all()):
        return "its weights are signs, but some are 0, which no bit can say"
    spread = float(((most - least) / most.clamp_min(1e-300)).max())
    return (f"its weights are near to one magnitude a channel, but differ by up to {spread:.1e} "
            "of it" if spread <= 0.1 else "")


def _through(node: Any) -> Any:
    while is_call(node, *_SAME) or (is_call(node, aten.to.dtype, aten._to_copy.default)
                                    and node.meta["val"].is_floating_point()
                                    and node.args[0].meta["val"].is_floating_point()
                                    and dtype(node) == dtype(node.args[0])):
        node = node.args[0]
    return node


def _sign(net: Net, node: Any) -> tuple[fx.Node, int] | None:
    """(x, the sign that 0 has) where a node is the sign of x, in any of its forms."""
    node = _through(node)
    if is_call(node, aten.sign.default):
        inner = _sign(net, node.args[0])
        return inner or (node.args[0], 0)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _straight_through(net, node) or _scaled_comparison(net, node)
    if is_call(node, aten.where.self, aten.where.Scalar, aten.where.ScalarSelf,
               aten.where.ScalarOther):
        condition, high, low = node.args
        values = _number(net, high), _number(net, low)
        compared = _compared(condition)
        if compared is None or set(values) != {1.0, -1.0}:
            return None
        return _oriented(*compared, upward=values[0] == 1.0)
    return None


def _straight_through(net: Net, node: fx.Node) -> tuple[fx.Node, int] | None:
    """(sign(x) - y) + y or sign(x) + (y - y), in either order."""
    if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
        return None
    for first, second in (node.args[:2], node.args[1::-1]):
        inner = _through(first)
        if is_call(inner, aten.sub.Tensor) and arguments(inner)["alpha"] == 1 and (
                _equal(*inner.args[:2])):
            return _sign(net, second)
        if is_call(inner, aten.sub.Tensor) and arguments(inner)["alpha"] == 1 and (
                _equal(inner.args[1], second)):
            return _sign(net, inner.args[0])
    return None


def _equal(a: Any, b: Any) -> bool:
    """Whether two nodes are one, or the same call of equal nodes."""
    a, b = _through(a), _through(b)
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b)
    return a is b or (
        a.op == b.op == "call_function" and a.target is b.target and a.kwargs == b.kwargs
        and len(a.args) == len(b.args) and all(map(_equal, a.args, b.args)))


def _scaled_comparison(net: Net, node: fx.Node) -> tuple[fx.Node, int] | None:
    """2 (x >= 0) - 1, the comparison as numbers."""
    offset = _number(net, node.args[1])
    if offset is not None and node.target is aten.sub.Tensor:
        offset = -offset
    product = _through(node.args[0])
    if offset != -1.0 or not is_call(product, aten.mul.Tensor) or _number(
            net, product.args[1]) != 2.0:
        return None
    number = product.args[0]
    while is_call(number, *_SAME, aten.to.dtype, aten._to_copy.default):
        number = number.args[0]
    compared = _compared(number)
    return None if compared is None else _oriented(*compared, upward=True)


def _compared(node: Any) -> tuple[fx.Node, str] | None:
    """(x, operator) of a comparison of x with 0."""
    for name in ("ge", "gt", "le", "lt"):
        if is_call(node, getattr(aten, name).Scalar) and node.args[1] == 0:
            return node.args[0], name
    return None


def _oriented(source: fx.Node, name: str, upward: bool) -> tuple[fx.Node, int] | None:
    """Of x compared with 0, where the sign of a positive x is +1."""
    if (name in ("ge", "gt")) != upward:
        return None
    return source, 1 if name in ("ge", "lt") else -1


def _number(net: Net, value: Any) -> float | None:
    """A scalar, a constant of one value, or a tensor filled with one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if is_call(value, *_FULL):
        return _FULL[value.target]
    if is_call(value, aten.full_like.default, aten.full.default):
        return _number(net, value.args[1])
    if is_call(value, aten.neg.default):
        inner = _number(net, value.args[0])
        return None if inner is None else -inner
    found = net.value(value)
    if found is None or not found.numel() or not bool((found == found.flatten()[0]).all()):
        return None
    return float(found.flatten()[0])


