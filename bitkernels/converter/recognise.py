"""Products of signs in code that computes them on real numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import (
    CONV,
    LINEAR,
    Net,
    arguments,
    aten,
    dtype,
    is_call,
    new_call,
    ops,
    shape,
)
from bitkernels.converter.sign_forms import (
    OF_SIGNS,
    PADS,
    TAKE_SIGNS,
    Sign,
    factor_of,
    often_zero,
    sign_of,
    through,
)

# Of a channel's magnitude: what rounding in float32 leaves of straight-through forms whose result
# was stored. Types that round more coarsely have the step between two of their numbers.
TOLERANCE = 1e-5
_PACK = ops.sign_pack.default
_CONVS = (aten.conv2d.default, aten.conv2d.padding, aten.conv1d.default)
_TAKE = "convert(..., sign_of_zero=1) takes it as +1"
ZERO_IS_0 = f"torch.sign(0) is 0, which no bit can say; {_TAKE}"
ZERO_IS_MINUS = f"its sign of 0 is -1, that of bits +1; {_TAKE}"


def recognise(net: Net, sign_of_zero: int | None) -> dict[fx.Node, str]:
    """Real convolutions and linear layers of signs with weights of one magnitude a channel become
    products of bits, that magnitude their scale. Returns why others did not, though they look so.

    What is a sign: `sign_of`; of convolutions also padded with 0, 1 or -1. Binary operators read
    what a sign is of.
    """
    reasons: dict[fx.Node, str] = {}
    for pack in net.calls(*TAKE_SIGNS):
        input: Any = pack.args[0]
        found = sign_of(net, input)
        if found is not None and found.at_zero == 1 and found.factor > 0 and (
                shape(found.source) == shape(input) and dtype(found.source) == dtype(input)):
            pack.args = (found.source, *pack.args[1:])
    for node in net.calls(*_CONVS, aten.linear.default):
        given = arguments(node)
        weight = net.value(given["weight"])
        if weight is None or not weight.is_floating_point() or weight.dim() < 2:
            continue
        padding = _padding(given["input"], given)
        input = given["input"] if padding is None else padding.input
        sign = sign_of(net, input)
        if sign is None:
            if is_call(input, *PADS) and sign_of(net, input.args[0]) is not None:
                reasons[node] = "its input is a sign, padded with 0 on one side more than another"
            elif (factor := factor_of(net, input)) is not None:
                reasons[node] = "its input is a sign times a factor " + (
                    "that is computed from the input" if net.value(factor) is None
                    else "for each channel or place, not for each output")
            continue
        inner = _padding(sign.source, given) if padding is None and (
            shape(sign.source) == shape(input)) else None
        if inner is not None:  # padded first, then the sign taken
            value = math.copysign(1.0, inner.value) if inner.value else sign.at_zero
            if not value or not any(given["padding"]):
                padding = replace(inner, value=value * sign.factor)
                input, sign = inner.input, replace(sign, source=inner.input)
        scale = _magnitudes(weight)
        if isinstance(scale, str) and given["weight"] in net.zeros_as_one:
            ones = net.zeros_as_one[given["weight"]]
            if not isinstance(_magnitudes(ones), str):
                if sign_of_zero is None:
                    scale += f"; {_TAKE}"
                else:
                    weight, scale = ones, _magnitudes(ones)
        if isinstance(scale, str):
            reasons[node] = scale
            continue
        if (not sign.source.meta["val"].is_floating_point() or shape(sign.source) != shape(input)
                or node.target in _CONVS and len(shape(input)) != weight.dim()):
            continue
        if sign.at_zero != 1:
            zeros = often_zero(net, sign.source)
            if zeros is not None and sign_of_zero is not None:
                reasons[node] = (f"its input is the sign of what {_name(zeros)} gives, which is "
                                 "exactly 0 for many inputs, and no bit can say that")
                continue
            if sign_of_zero is None:
                reasons[node] = ZERO_IS_0 if sign.at_zero == 0 else ZERO_IS_MINUS
                continue
        if isinstance(given.get("padding"), str) or (
                given["bias"] is not None and net.value(given["bias"]) is None):
            continue
        if padding is not None and padding.value not in (0, sign.factor, -sign.factor):
            reasons[node] = (f"its input is a sign padded with {padding.value:g}, and bits can be "
                             "padded with 0 and the sign's own two values")
            continue
        _replace(net, node, given, sign, padding, weight, scale)
    net.graph.eliminate_dead_code()  # what only the real forms of signs read
    return reasons


@dataclass(frozen=True)
class _Padding:
    """Of a convolution's input: what is padded, by how much on both sides, and with what."""

    input: fx.Node
    sizes: list[int]
    value: float


def _padding(input: fx.Node, conv: dict[str, Any]) -> _Padding | None:
    """What pads an image in front of a convolution with one number, as much on one side as on the
    other, and the convolution's own padding with 0."""
    node = through(input)
    own = conv.get("padding")
    rank = len(shape(node)) - 2
    if not is_call(node, *PADS) or rank not in (1, 2) or isinstance(own, str) or own is None or (
            len(shape(node)) != len(shape(conv["weight"]))):
        return None
    given, own = arguments(node), [int(n) for n in own] * (rank // len(own))
    value, sizes = float(given["value"] or 0), list(given["pad"])
    if given.get("mode", "constant") != "constant" or len(sizes) > 2 * rank or not all(
            isinstance(n, int) and n >= 0 for n in sizes):
        return None
    left, right, top, bottom = (*sizes, 0, 0)[:4]
    if left != right or top != bottom or value != 0 and any(own):
        return None
    return _Padding(given["self"], [n + m for n, m in zip((top, left)[2 - rank:], own,
                                                          strict=True)], value)


def _name(node: fx.Node) -> str:
    if is_call(node, *OF_SIGNS):
        return "a product of signs"
    return str(node.target.overloadpacket).removeprefix("aten.")  # type: ignore[union-attr]


def _replace(net: Net, node: fx.Node, given: dict[str, Any], sign: Sign,
             padding: _Padding | None, weight: Tensor, scale: Tensor) -> None:
    source, row = sign.source, node.target is aten.conv1d.default
    conv = node.target in _CONVS
    dim, name = 1 if conv else -1, net.origin(given["weight"])
    kept: dict[str, Any] = {}
    if conv:
        kept = {key: given[key] for key in ("stride", "padding", "dilation", "groups")}
        kept |= dict(pad_value=0, channels_last=False)
    if padding is not None:
        kept |= dict(padding=padding.sizes, pad_value=int(padding.value / sign.factor))
    if row:  # a sequence is an image of one row
        weight = weight.unsqueeze(2)
        for key, along in (("stride", 1), ("padding", 0), ("dilation", 1)):
            kept[key] = [along, kept[key][-1]]
    scale = (scale * sign.factor).float()
    factor = None if bool((scale == 1).all()) else net.constant(scale, f"{name}.scale")
    if row:
        source = new_call(node, aten.unsqueeze.default, source, 2)
    with net.graph.inserting_before(node):
        signs = net.graph.call_function(_PACK, (source, None, dim))
        made = net.graph.call_function(CONV if conv else LINEAR, (), dict(
            words=signs, weight_words=net.constant(_PACK(weight, None, 1), name),
            channels=int(source.meta["val"].shape[dim]), out_channels=weight.shape[0],
            scale=factor, bias=given["bias"], dtype=dtype(node), **kept))
        if row:
            with source.meta["val"].fake_mode:
                made.meta["val"] = node.meta["val"].unsqueeze(2)
            made = net.graph.call_function(aten.squeeze.dim, (made, 2))
    with source.meta["val"].fake_mode:
        signs.meta["val"] = _PACK(source.meta["val"], None, dim)
    net.replace(node, made)


def _magnitudes(weight: Tensor) -> Tensor | str:
    """The magnitude of each output channel's weights, if they have but one; else why not, in words
    where they look as if they should have."""
    sizes = weight.double().abs().flatten(1)
    least, most = sizes.amin(1), sizes.amax(1)
    if bool((most - least <= max(TOLERANCE, torch.finfo(weight.dtype).eps) * most).all()):
        return (least + most) / 2
    if bool(((sizes == 0) | (sizes == most[:, None])).all()):
        return "its weights are signs, but some are 0, which no bit can say"
    spread = float(((most - least) / most.clamp_min(1e-300)).max())
    return (f"its weights are near to one magnitude a channel, but differ by up to {spread:.1e} "
            "of it" if spread <= 0.1 else
            "its input is a sign, but its weights have more than one magnitude a channel")
