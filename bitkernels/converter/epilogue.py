"""What follows a product of bits, moved into its epilogue.

The epilogue (docs/architecture.md) is clamp, scale and bias, residual, RPReLU, in this order. Each
rule takes the one node that uses a product and returns the node that the product then stands for,
or None where the step does not fit any more. Factors are folded in float64 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import (
    CONV,
    PRODUCTS,
    Net,
    arguments,
    aten,
    channels,
    channels_second,
    device,
    dtype,
    is_call,
    keywords,
    norm_affine,
    only_user,
    ops,
    shape,
)


def fuse_epilogues(net: Net) -> None:
    for product in net.calls(*PRODUCTS):
        while _absorbed(net, product):
            pass


def _absorbed(net: Net, product: fx.Node) -> bool:
    user = only_user(product)
    if user is None or user.op != "call_function":
        return False
    rule = _RULES.get(user.target)
    if rule is None or not product.meta["val"].is_floating_point():
        return False
    kept = dict(product.kwargs)
    last = rule(net, product, user)
    if last is None or dtype(last) != dtype(product) or shape(last) != shape(product):
        product.kwargs = kept
        return False
    last.prepend(product)  # behind everything that it now reads
    product.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(product)
    for node in dict.fromkeys((last, user)):
        net.graph.erase_node(node)
    return True


def vector(net: Net, value: Any, product: fx.Node) -> Tensor | None:
    """A scalar, or a constant with one number a channel, as float64 (channels,); else None."""
    count = channels(product)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _all(product, float(value))
    found = net.value(value)
    if found is None or not found.is_floating_point():
        return None
    if found.numel() == 1 and found.dim() <= len(shape(product)):
        return found.double().reshape(1).expand(count)
    rest = 2 if product.target is CONV else 0  # dimensions behind the channels
    sizes = [1] * max(0, len(shape(product)) - found.dim()) + list(found.shape)
    axis = len(sizes) - rest - 1
    if found.dim() > len(shape(product)) or axis < 0 or sizes[axis] != count or (
            found.numel() != count):
        return None
    return found.double().reshape(count)


def _all(product: fx.Node, value: float) -> Tensor:
    """A vector of the channels with one value."""
    return torch.full((channels(product),), value, dtype=torch.float64, device=device(product))


def _set(net: Net, product: fx.Node, **vectors: Tensor | fx.Node | float | None) -> None:
    name = net.origin(product.kwargs["weight_words"])
    kept = keywords(product)
    for key, value in vectors.items():
        kept[key] = (net.constant(value.to(torch.float32).contiguous(), f"{name}.{key}")
                     if isinstance(value, Tensor) else value)
    product.kwargs = kept


def _has(product: fx.Node, *names: str) -> bool:
    return any(product.kwargs.get(name) is not None for name in names)


def _affine(net: Net, product: fx.Node, factor: Tensor | None, offset: Tensor | None) -> bool:
    """The value times a factor plus an offset, where nothing stands between."""
    if _has(product, "residual", "slope"):
        return False
    scale, bias = (net.value(product.kwargs[name]) for name in ("scale", "bias"))
    scale, bias = (None if t is None else t.double() for t in (scale, bias))
    if factor is not None:
        scale = factor if scale is None else scale * factor
        bias = None if bias is None else bias * factor
    if offset is not None:
        bias = offset if bias is None else bias + offset
    _set(net, product, scale=scale, bias=bias)
    return True


def _batch_norm(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    given = arguments(user)
    affine = norm_affine(net, given)
    if affine is None or given["input"] is not product or not channels_second(product):
        return None
    return user if _affine(net, product, *affine) else None


def _mul(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    other = _other(user, product)
    factor = vector(net, other, product)
    return user if factor is not None and _affine(net, product, factor, None) else None


def _neg(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    return user if _affine(net, product, _all(product, -1.0), None) else None


def _div(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    if user.args[0] is not product:
        return None
    factor = vector(net, user.args[1], product)
    return user if factor is not None and _affine(net, product, 1 / factor, None) else None


def _add(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    """A bias, a residual, or the shifts of an RPReLU that is written out."""
    given = arguments(user)
    subtract = user.target is aten.sub.Tensor
    if given["alpha"] != 1 or (subtract and given["self"] is not product):
        return None
    other = _other(user, product)
    offset = vector(net, other, product)
    if offset is not None:
        offset = -offset if subtract else offset
        if _has(product, "slope"):
            old = net.value(product.kwargs["shift_out"])
            _set(net, product, shift_out=offset if old is None else old.double() + offset)
            return user
        if _affine(net, product, None, offset):
            return user
        after = only_user(user)
        if after is None or not is_call(after, aten.prelu.default) or after.args[0] is not user:
            return None
        return _prelu(net, product, after, shift_in=offset)
    if (subtract or not isinstance(other, fx.Node) or _has(product, "residual", "slope")
            or shape(other) != shape(product) or not other.meta["val"].is_floating_point()):
        return None
    _set(net, product, residual=other)
    return user


def _clamped(net: Net, product: fx.Node, low: float | None, high: float | None) -> bool:
    """A clamp of the value as one of the dot product, where that is the same."""
    if _has(product, "residual", "slope", "bias"):
        return False
    scale = net.value(product.kwargs["scale"])
    only_sign = low in (0, None) and high is None  # of the value: any positive factor keeps it
    if scale is not None and not (only_sign and bool((scale >= 0).all())):
        return False
    kept = keywords(product)
    bounds = [b for b in (kept["clamp_min"], low) if b is not None]
    if kept["clamp_max"] is not None and low is not None:
        return False
    if high is not None and kept["clamp_max"] is not None:
        high = min(high, kept["clamp_max"])
    _set(net, product, clamp_min=max(bounds) if bounds else None,
         clamp_max=kept["clamp_max"] if high is None else float(high))
    return True


def _relu(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    if _clamped(net, product, 0.0, None):
        return user
    return _sloped(net, product, user, _all(product, 0.0))


def _clamp(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    given = arguments(user)
    low, high = (given.get(a, given.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if any(isinstance(v, fx.Node) for v in (low, high)):
        return None
    low, high = (None if v is None else float(v) for v in (low, high))
    return user if _clamped(net, product, low, high) else None


def _relu6(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    return user if _clamped(net, product, 0.0, 6.0) else None


def _sloped(net: Net, product: fx.Node, user: fx.Node, slope: Tensor | None,
            shift_in: Tensor | None = None, shift_out: Tensor | None = None) -> fx.Node | None:
    if slope is None or _has(product, "slope"):
        return None
    _set(net, product, slope=slope, shift_in=shift_in, shift_out=shift_out)
    return user


def _prelu(net: Net, product: fx.Node, user: fx.Node, shift_in: Tensor | None = None
           ) -> fx.Node | None:
    weight = net.value(user.args[1])
    if weight is None or user.args[1] is product or not (
            weight.numel() == 1 or channels_second(product)):
        return None
    return _sloped(net, product, user, weight.double().expand(channels(product)), shift_in)


def _leaky_relu(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    slope = arguments(user)["negative_slope"]
    return _sloped(net, product, user, _all(product, float(slope)))


def _rprelu(net: Net, product: fx.Node, user: fx.Node) -> fx.Node | None:
    vectors = [net.value(v) for v in user.args[1:]]
    if user.args[0] is not product or any(v is None for v in vectors):
        return None
    shift_in, slope, shift_out = vectors
    return _sloped(net, product, user, slope, shift_in, shift_out)


def _other(user: fx.Node, product: fx.Node) -> Any:
    first, second = user.args[:2]
    return second if first is product else first


_RULES: dict[Any, Any] = {
    aten.batch_norm.default: _batch_norm,
    aten.mul.Tensor: _mul, aten.mul.Scalar: _mul,
    aten.neg.default: _neg,
    aten.div.Tensor: _div, aten.div.Scalar: _div,
    aten.add.Tensor: _add, aten.sub.Tensor: _add, aten.add.Scalar: _add, aten.sub.Scalar: _add,
    aten.relu.default: _relu, aten.relu6.default: _relu6,
    aten.clamp.default: _clamp, aten.hardtanh.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.prelu.default: _prelu, aten.leaky_relu.default: _leaky_relu,
    ops.rprelu.default: _rprelu,
}
