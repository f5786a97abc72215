"""Signs in code that computes on real numbers: what a value is the sign of, in any spelling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import (
    PRODUCTS,
    Net,
    arguments,
    aten,
    dtype,
    is_call,
    ops,
    shape,
)

_SAME = (aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default,
         aten.lift_fresh_copy.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_SIGNS = (aten.sign.default, aten.sgn.default)
_WHERE = (aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther)
_MASKED = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_CLAMPS = (aten.clamp.default, aten.hardtanh.default)
TAKE_SIGNS = (ops.binary_conv2d.default, ops.binary_conv2d.padding, ops.binary_linear.default,
              ops.binary_conv_transpose2d.default)  # of their input
OF_SIGNS = (*PRODUCTS, *TAKE_SIGNS)
PADS = (aten.pad.default, aten.constant_pad_nd.default)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)
_FULL = {aten.ones_like.default: 1.0, aten.zeros_like.default: 0.0}
_ARRANGED = (aten.reshape.default, aten.view.default, aten.flatten.using_ints,
             aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
             aten.squeeze.dims, aten.slice.Tensor)
_LARGEST = (aten.max_pool2d.default, aten.max_pool1d.default)
_ROUNDED_TO_ZERO = (aten.relu.default, aten.relu6.default, aten.hardsigmoid.default,
                    aten.hardswish.default, aten.threshold.default, aten.hardshrink.default,
                    aten.softshrink.default, aten.round.default, aten.trunc.default,
                    aten.floor.default, aten.ceil.default)
_KEEP_ZEROS = (*_SAME, *_CASTS, *_ARRANGED, aten.expand.default, aten.max_pool1d.default,
               aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
               aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.prelu.default,
               aten.leaky_relu.default)


@dataclass(frozen=True)
class Sign:
    """A value is `factor` times the sign of `source`, where the sign of 0 is `at_zero`."""

    source: fx.Node
    at_zero: int
    factor: float = 1.0


def sign_of(net: Net, node: Any) -> Sign | None:
    """What a node is the sign of: torch.sign, where(x >= 0, 1, -1), 2 (x >= 0) - 1 and their like,
    with its zeros filled in, rearranged, times a number, and in the straight-through forms
    (sign(x) - y) + y and sign(x) + (y - y)."""
    node = through(node)
    if is_call(node, *_SIGNS):
        return _sign_again(net, node.args[0]) or Sign(node.args[0], 0)
    if is_call(node, *_WHERE):
        return _chosen(net, *node.args)
    if is_call(node, *_MASKED):
        return _filled(net, *node.args)
    if is_call(node, aten.index_put.default):
        indices = node.args[1]
        masked = len(indices) == 1 and dtype(indices[0]) is torch.bool  # integers name places
        return None if not masked or arguments(node)["accumulate"] else _filled(
            net, node.args[0], indices[0], node.args[2])
    if is_call(node, *_CLAMPS):
        bounds = _bounds(node)
        inner = None if bounds is None else sign_of(net, node.args[0])
        return inner if inner and bounds and bounds[0] <= -abs(inner.factor) and (
            bounds[1] >= abs(inner.factor)) else None
    if is_call(node, *_ARRANGED):
        return _arranged(net, node)
    if is_call(node, *_LARGEST):
        pooled = _arranged(net, node)  # the largest of signs is the sign of the largest
        return pooled if pooled is not None and pooled.factor > 0 else None
    if is_call(node, *PADS):
        return _padded(net, node)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return (_straight_through(net, node) or _of_comparison(net, node)
                or _difference(node) or _zeros_added(net, node))
    if is_call(node, aten.neg.default, *_SCALES):
        return _of_comparison(net, node) or _scaled(net, node)
    return None


def through(node: Any) -> Any:
    """A value behind what does not change it: copies, and casts to its own type."""
    while is_call(node, *_SAME) or (is_call(node, *_CASTS) and _is_real(node)
                                    and _is_real(node.args[0])
                                    and dtype(node) == dtype(node.args[0])):
        node = node.args[0]
    return node


def often_zero(net: Net, node: Any) -> fx.Node | None:
    """The call that makes a value exactly 0 for many inputs, or None: a ReLU and its like,
    rounding, a border of zeros, the sum of two signs and of products of signs."""
    while is_call(node, *_KEEP_ZEROS):
        node = node.args[0]
    if is_call(node, *_ROUNDED_TO_ZERO):
        return node
    if is_call(node, *OF_SIGNS):
        return node if arguments(node)["bias"] is None else None
    if is_call(node, *PADS):
        given = arguments(node)
        zeros = given.get("mode", "constant") == "constant" and not given["value"]
        return node if zeros else often_zero(net, given["self"])
    if is_call(node, *_CLAMPS, aten.clamp_min.default):
        return node if 0 in (_bounds(node) or ()) else often_zero(net, node.args[0])
    if is_call(node, aten.cat.default, *_SCALES):
        parts = node.args[0] if node.target is aten.cat.default else node.args[:2]
        return next((found for part in parts if (found := often_zero(net, part))), None)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        if all(sign_of(net, part) is not None for part in node.args[:2]):
            return node
        first = often_zero(net, node.args[0])
        return None if first is None or often_zero(net, node.args[1]) is None else first
    return None


def number(net: Net, value: Any) -> float | None:
    """A scalar, a constant of one value, or a tensor filled with one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if is_call(value, *_FULL):
        return _FULL[value.target]
    if is_call(value, aten.full_like.default, aten.full.default):
        return _in_type(number(net, value.args[1]), value)
    if is_call(value, aten.neg.default):
        inner = number(net, value.args[0])
        return None if inner is None else _in_type(-inner, value)
    found = net.value(value)
    if found is None or not found.numel() or not bool((found == found.flatten()[0]).all()):
        return None
    return float(found.flatten()[0])


def _is_real(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _in_type(value: float | None, node: fx.Node) -> float | None:
    """A number as a node of integers or bools holds it."""
    return value if value is None or _is_real(node) else float(
        torch.tensor(value, device="cpu").to(dtype(node)))


def _sign_again(net: Net, node: Any) -> Sign | None:
    """sign(s) and sign(s + c) of a sign s, where c says which sign 0 has and is below 1."""
    inner = sign_of(net, node)
    if inner is not None:
        return replace(inner, factor=1.0) if inner.factor > 0 else None
    node = through(node)
    if not is_call(node, aten.add.Tensor, aten.sub.Tensor) or arguments(node)["alpha"] != 1:
        return None
    offset = number(net, node.args[1])
    inner = sign_of(net, node.args[0]) if offset else None
    if inner is None or offset is None or inner.factor <= abs(offset):
        return None
    if node.target is aten.sub.Tensor:
        offset = -offset
    return Sign(inner.source, inner.at_zero or (1 if offset > 0 else -1))


def _chosen(net: Net, condition: Any, high: Any, low: Any) -> Sign | None:
    """where(x >= 0, 1, -1) and its like; where(s == 0, 1, s) of a sign s."""
    compared = _compared(condition)
    values = number(net, high), number(net, low)
    if compared is not None and set(values) == {1.0, -1.0}:
        return _oriented(*compared, upward=values[0] == 1.0)
    if is_call(condition, aten.ne.Scalar):
        return _filled(net, high, condition, low, aten.ne.Scalar)
    return _filled(net, low, condition, high)


def _filled(net: Net, signs: Any, where: Any, value: Any,
            compare: Any = aten.eq.Scalar) -> Sign | None:
    """A sign whose zeros were filled with 1 or -1."""
    at_zero = number(net, value)
    found = sign_of(net, signs) if at_zero in (1.0, -1.0) else None
    if at_zero is None or found is None or found.factor != 1 or (
            not _are_zeros(net, where, found, compare)):
        return None
    return replace(found, at_zero=int(at_zero))


def _are_zeros(net: Net, node: Any, sign: Sign, compare: Any = aten.eq.Scalar) -> bool:
    """Whether a node is true where what a sign is of is 0: it compares that, or a sign of it."""
    node = _uncast(node)
    if not is_call(node, compare) or node.args[1] != 0:
        return False
    of = sign_of(net, node.args[0])
    return _equal(node.args[0], sign.source) or of is not None and (
        of.factor != 0 and of.at_zero == 0 and of.source is sign.source)


def _zeros_added(net: Net, node: fx.Node) -> Sign | None:
    """s + (s == 0)."""
    mask = _uncast(node.args[1])
    found = sign_of(net, node.args[0]) if is_call(mask, aten.eq.Scalar) else None
    if found is None or found.factor != 1 or arguments(node)["alpha"] != 1 or (
            found.at_zero or not _are_zeros(net, mask, found)):
        return None
    return replace(found, at_zero=1 if node.target is aten.add.Tensor else -1)


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """Of a clamp by numbers."""
    given = arguments(node)
    low, high = (given.get(a, given.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    low, high = -float("inf") if low is None else low, float("inf") if high is None else high
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return float(low), float(high)


def _arranged(net: Net, node: fx.Node) -> Sign | None:
    """Signs in another order are the signs of their sources in that order."""
    found = sign_of(net, node.args[0])
    return found and _again(node, found, *node.args[1:])


def _padded(net: Net, node: fx.Node) -> Sign | None:
    """Signs padded with signs are the signs of their sources padded with 1 or -1, or as they were:
    with what is inside."""
    given = arguments(node)
    if given.get("mode", "constant") != "constant":
        return _arranged(net, node)
    found, value = sign_of(net, given["self"]), given["value"] or 0.0
    if found is None or abs(value) != abs(found.factor):
        return None
    middle = ("constant",) if node.target is aten.pad.default else ()
    return _again(node, found, given["pad"], *middle, value / found.factor)


def _again(node: fx.Node, sign: Sign, *rest: Any) -> Sign | None:
    """The call of a node on what a sign is of, in place of the sign."""
    source = sign.source
    if shape(source) != shape(node.args[0]):  # type: ignore[arg-type]
        return None
    with node.graph.inserting_before(node):
        made = node.graph.call_function(
            node.target, (source, *rest))  # type: ignore[arg-type]
    with source.meta["val"].fake_mode:
        made.meta["val"] = torch.empty_like(node.meta["val"], dtype=dtype(source))
    return replace(sign, source=made)


def _scaled(net: Net, node: fx.Node) -> Sign | None:
    """A sign times a number."""
    if node.target is aten.neg.default:
        found, factor = sign_of(net, node.args[0]), -1.0
    else:
        first, second = node.args[:2]
        if node.target is aten.mul.Tensor and number(net, second) is None:
            first, second = second, first
        given = number(net, second)
        found = None if given is None else sign_of(net, first)
        if found is None or given is None or not given:
            return None
        factor = given if node.target is aten.mul.Tensor else 1 / given
    if found is None or dtype(found.source) != dtype(node):
        return None
    factor *= found.factor
    held = torch.tensor(factor, dtype=dtype(node), device="cpu")  # 0 or infinite: its type ends
    return replace(found, factor=factor) if held.isfinite() and held != 0 else None


def factor_of(net: Net, node: Any) -> Any:
    """The tensor that a sign is multiplied by, also within a straight-through form; or None."""
    node = through(node)
    if is_call(node, aten.add.Tensor):
        return _straight_through(net, node, factor_of)
    if not is_call(node, aten.mul.Tensor):
        return None
    for sign, factor in (node.args[:2], node.args[1::-1]):
        if isinstance(factor, fx.Node) and sign_of(net, sign) is not None:
            return factor
    return None


def _straight_through(net: Net, node: fx.Node, of: Any = sign_of) -> Any:
    """What is found `of` the b in (b - y) + y or b + (y - y), in either order."""
    if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
        return None
    for first, second in (node.args[:2], node.args[1::-1]):
        inner = through(first)
        if not is_call(inner, aten.sub.Tensor) or arguments(inner)["alpha"] != 1:
            continue
        if _equal(*inner.args[:2]):
            return of(net, second)
        if _equal(inner.args[1], second):
            return of(net, inner.args[0])
    return None


def _equal(a: Any, b: Any) -> bool:
    """Whether two nodes are one, or the same call of equal nodes."""
    waiting, met = [(a, b)], set()
    while waiting:  # a graph may be deep, and what several calls read is compared once
        a, b = map(through, waiting.pop())
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            if type(a) is not type(b) or a != b:
                return False
        elif a is not b and (a, b) not in met:
            met.add((a, b))
            if not (a.op == b.op == "call_function" and a.target is b.target
                    and a.kwargs == b.kwargs and len(a.args) == len(b.args)
                    and torch.Tag.nondeterministic_seeded not in getattr(a.target, "tags", ())):
                return False
            waiting += zip(a.args, b.args, strict=True)
    return True


def _of_comparison(net: Net, node: fx.Node) -> Sign | None:
    """2 (x >= 0) - 1, 1 - 2 (x < 0) and other such numbers made of a comparison."""
    found = _both_values(net, node)
    if found is None or found[1].tolist() not in ([-1, 1], [1, -1]):
        return None
    return _oriented(*found[0], upward=bool(found[1][1] > 0))


def _both_values(net: Net, node: Any) -> tuple[tuple[fx.Node, str], Tensor] | None:
    """A comparison, and what is made of it where it is false and where it is true, computed as the
    model does: integers wrap around and cut off, bools add up to true."""
    if (compared := _compared(node)) is not None:
        return compared, torch.tensor([False, True], device="cpu")
    casts = is_call(node, *_SAME, *_CASTS)
    if not casts and not is_call(node, aten.neg.default, aten.add.Tensor, aten.sub.Tensor,
                                 *_SCALES):
        return None
    given = () if casts or node.target is aten.neg.default else (number(net, node.args[1]),)
    found = None if None in given else _both_values(net, node.args[0])
    if found is None:
        return None
    values = found[1] if casts else node.target(found[1], *given, **node.kwargs)
    return found[0], values.to(dtype(node))


def _difference(node: fx.Node) -> Sign | None:
    """(x > 0) - (x < 0) as numbers, with either of them or both true of 0."""
    if node.target is not aten.sub.Tensor or arguments(node)["alpha"] != 1 or (
            not dtype(node).is_signed):
        return None
    high, low = (_compared(_uncast(side)) for side in node.args[:2])
    if high is None or low is None or high[0] is not low[0] or high[1] not in ("gt", "ge") or (
            low[1] not in ("lt", "le")):
        return None
    return Sign(high[0], (high[1] == "ge") - (low[1] == "le"))


def _uncast(mask: Any) -> Any:
    """A comparison behind casts of its result, which is 0 and 1 in every type."""
    while is_call(mask, *_SAME, *_CASTS):
        mask = mask.args[0]
    return mask


def _compared(node: Any) -> tuple[fx.Node, str] | None:
    """(x, operator) of a comparison of x with 0."""
    for name in ("ge", "gt", "le", "lt"):
        if is_call(node, getattr(aten, name).Scalar) and node.args[1] == 0:
            return node.args[0], name
    return None


def _oriented(source: fx.Node, name: str, upward: bool) -> Sign | None:
    """Of x compared with 0, where the sign of a positive x is +1."""
    if (name in ("ge", "gt")) != upward:
        return None
    return Sign(source, 1 if name in ("ge", "lt") else -1)
