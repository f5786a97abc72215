"""Signs on their way to the next product: through pools, joins and norms, and out of epilogues."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from bitkernels.converter.net import (
    CONV,
    LINEAR,
    PRODUCTS,
    Net,
    arguments,
    aten,
    channels,
    device,
    dtype,
    is_call,
    keywords,
    norm_affine,
    ops,
    shape,
)
from bitkernels.thresholds import fold_threshold

_PACK = ops.sign_pack.default
_POOL = ops.packed_max_pool2d.default
_PACKED: dict[Any, Any] = {CONV: ops.packed_conv2d.packed, LINEAR: ops.packed_linear.packed}
_BOTH: dict[Any, Any] = {CONV: ops.packed_conv2d.both, LINEAR: ops.packed_linear.both}
_FLATTENS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_UNPACKED_ONLY = ("dtype", "channels_last")  # arguments of what has a real output


def move_signs(net: Net) -> None:
    """Signs are taken as early as they can be, and of equal ones once."""
    changed = True
    while changed:
        changed = any([_moved(net, pack) for pack in net.calls(_PACK)])
        _join_equal(net)
        net.graph.eliminate_dead_code()


def _moved(net: Net, pack: fx.Node) -> bool:
    given = arguments(pack)
    source, shift = given["input"], given["shift"]
    rank = source.meta["val"].dim()
    if is_call(source, ops.rsign.default) and shift is None and given["dim"] % rank == 1:
        inner = arguments(source)
        return _again(pack, inner["input"], inner["shift"])
    if _keeps_signs(net, source, shift):
        return _again(pack, source.args[0], shift)
    if rank == 2 and is_call(source, *_FLATTENS):
        return _through_flatten(net, pack, source, shift)
    if given["dim"] % rank != 1:
        return False
    if shift is None and is_call(source, aten.add.Tensor, aten.sub.Tensor):
        added = _added(net, source)
        return added is not None and _again(pack, *added)
    if is_call(source, aten.batch_norm.default) and rank in (2, 4):
        return _through_norm(net, pack, source, shift)
    if rank != 4:
        return False
    if is_call(source, aten.max_pool2d.default):
        return _through_pool(net, pack, source, shift)
    if is_call(source, aten.cat.default):
        return _through_cat(net, pack, source, shift)
    return False


def _keeps_signs(net: Net, node: fx.Node, shift: Any) -> bool:
    """Whether sign(f(x) + c) = sign(x + c) for all x: a clamp around -c; a PReLU, without c."""
    if is_call(node, aten.hardtanh.default, aten.clamp.default):
        given = arguments(node)
        low = given.get("min", given.get("min_val"))
        high = given.get("max", given.get("max_val"))
        point = torch.zeros(1, device=device(node)) if shift is None else net.value(shift)
        if point is None or any(isinstance(v, fx.Node) for v in (low, high)):
            return False
        return (low is None or bool((low < -point).all())) and (
            high is None or bool((high >= -point).all()))
    if shift is None and is_call(node, aten.prelu.default):
        slope = net.value(node.args[1])
        return slope is not None and bool((slope > 0).all())
    if shift is None and is_call(node, aten.leaky_relu.default):
        return arguments(node)["negative_slope"] > 0
    return False


def _added(net: Net, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, the vector) of a sum of x and a number for each channel, which is the shift of a sign."""
    given = arguments(node)
    first, second = given["self"], given["other"]
    subtract = node.target is aten.sub.Tensor
    if not subtract and net.value(first) is not None:
        first, second = second, first
    count, rank = shape(node)[1], len(shape(node))
    if given["alpha"] != 1 or not isinstance(first, fx.Node) or shape(first) != shape(node) or not (
            dtype(first) == dtype(node) == torch.float32) or not isinstance(count, int):
        return None
    value, name = net.value(second), node.name
    if value is not None:
        name = net.origin(second)
    elif isinstance(second, (int, float)):
        value = torch.full((1,), float(second), dtype=torch.float32, device=device(node))
    if value is None or value.dtype != torch.float32 or value.dim() > rank:
        return None
    sizes = [1] * (rank - value.dim()) + list(value.shape)
    if value.numel() != 1 and (sizes[1] != count or value.numel() != count):
        return None
    vector = value.reshape(-1).expand(count)
    return first, net.constant((-vector if subtract else vector).contiguous(), f"{name}.sign_shift")


def _through_flatten(net: Net, pack: fx.Node, flat: fx.Node, shift: Any) -> bool:
    """Words of (N, C, H, W) one pixel after the other, where a pixel ends with a word.

    The weights of the linear layers that read them are put in that order.
    """
    source: Any = flat.args[0]
    readers = list(pack.users)
    if shift is not None or source.meta["val"].dim() != 4 or not all(
            is_call(r, LINEAR) and r.kwargs["words"] is pack
            and net.value(r.kwargs["weight_words"]) is not None for r in readers):
        return False
    batch, count, *image = shape(source)
    sizes = (count, *image)
    if not all(isinstance(n, int) for n in sizes) or count % 32 or (
            shape(flat)[1] != count * image[0] * image[1]):
        return False
    words = _signs(net, pack, source, None)
    with net.graph.inserting_before(pack):
        made = net.graph.call_function(aten.flatten.using_ints, (words, 1))
    for reader in readers:
        old = net.value(reader.kwargs["weight_words"])
        assert old is not None
        signs = ops.unpack(old, count * image[0] * image[1]).unflatten(1, sizes)
        new = net.constant(_PACK(signs, None, 1).flatten(1), net.origin(
            reader.kwargs["weight_words"]))
        reader.kwargs = {**reader.kwargs, "weight_words": new}
    net.replace(pack, made)
    return True


def _signs(net: Net, before: fx.Node, input: fx.Node, shift: Any) -> fx.Node:
    with net.graph.inserting_before(before):
        made = net.graph.call_function(_PACK, (input, shift, 1))
    with input.meta["val"].fake_mode:
        made.meta["val"] = _PACK(input.meta["val"], None, 1)
    return made


def _again(pack: fx.Node, input: fx.Node, shift: Any) -> bool:
    pack.args, pack.kwargs = (input, shift, arguments(pack)["dim"]), {}
    return True


def _only_signs(node: fx.Node) -> bool:
    """Whether nothing but signs is taken of a value."""
    return all(is_call(user, _PACK) and user.args[0] is node for user in node.users)


def _through_pool(net: Net, pack: fx.Node, pool: fx.Node, shift: Any) -> bool:
    """sign(max(x) + c) = max(sign(x + c))."""
    given = arguments(pool)
    if given["ceil_mode"] and not _has_whole_windows(given):
        return False
    if not _only_signs(pool) or (isinstance(shift, fx.Node) and net.value(shift) is None):
        return False
    signs = _signs(net, pack, given["self"], shift)
    with net.graph.inserting_before(pack):
        made = net.graph.call_function(_POOL, (
            signs, given["kernel_size"], given["stride"], given["padding"], given["dilation"],
            given["ceil_mode"]))
    net.replace(pack, made)
    return True


def _has_whole_windows(pool: dict[str, Any]) -> bool:
    """Whether no window is larger than the padded image, as one may be where sizes are rounded up;
    `packed_max_pool2d` refuses those."""
    def pair(name: str) -> list[int]:
        return list(pool[name]) * (2 // len(pool[name]))

    return all(isinstance(n, int) and n + 2 * p >= d * (k - 1) + 1 for n, k, p, d in zip(
        shape(pool["self"])[2:], pair("kernel_size"), pair("padding"), pair("dilation"),
        strict=True))


def _through_cat(net: Net, pack: fx.Node, cat: fx.Node, shift: Any) -> bool:
    """Signs of channels side by side are words side by side, where the parts end with a word."""
    given = arguments(cat)
    parts, value = list(given["tensors"]), None if shift is None else net.value(shift)
    if given["dim"] not in (1, -3) or (shift is not None and (value is None or value.dim() != 1)):
        return False
    sizes = [shape(part)[1] for part in parts]
    if any(not isinstance(n, int) or n % 32 for n in sizes[:-1]) or not any(
            is_call(part, *PRODUCTS) for part in parts):
        return False
    if not _only_signs(cat) and not all(is_call(part, *PRODUCTS) for part in parts):
        return False
    shifts: list[Any] = [None] * len(parts)
    if value is not None:
        shifts = [net.constant(t.contiguous(), net.origin(shift)) for t in value.split(sizes)]
    words = [_signs(net, pack, part, s) for part, s in zip(parts, shifts, strict=True)]
    with net.graph.inserting_before(pack):
        made = net.graph.call_function(aten.cat.default, (words, -1))
    net.replace(pack, made)
    return True


def _through_norm(net: Net, pack: fx.Node, norm: fx.Node, shift: Any) -> bool:
    """sign(g (x - m) + b + c) = sign(x + (b + c) / g - m), turned around where g is below 0.

    There the weights of the products that read the signs are negated, in that channel. A factor of
    0 leaves a constant sign, by an infinite shift.
    """
    given = arguments(norm)
    affine = norm_affine(net, given)
    offset = (torch.zeros(1, dtype=torch.float64, device=device(norm)) if shift is None
              else vector_of(net, shift))
    if affine is None or offset is None or not _only_signs(norm):
        return False
    factor, bias = affine
    bias = bias + offset
    turned = factor < 0
    moved = torch.where(factor == 0, torch.where(bias < 0, -torch.inf, torch.inf), bias / factor)
    moved = moved.float()
    if bool(turned.any()):
        readers = list(pack.users)
        if not all(_can_negate(net, reader, pack) for reader in readers):
            return False
        for reader in readers:
            _negate_inputs(net, reader, turned)
        # 0 is +1 before it is turned around too.
        below = torch.nextafter(moved, torch.full_like(moved, -torch.inf))
        moved = torch.where(turned, below, moved)
    name = net.origin(given["running_mean"])
    return _again(pack, given["input"], net.constant(moved, f"{name}.sign_shift"))


def _can_negate(net: Net, reader: fx.Node, pack: fx.Node) -> bool:
    """Whether a product reads these signs, with constant weights and no signs as padding."""
    if not is_call(reader, *PRODUCTS) or reader.kwargs["words"] is not pack:
        return False
    padded = reader.kwargs.get("pad_value", 0) != 0
    return not padded and net.value(reader.kwargs["weight_words"]) is not None


def vector_of(net: Net, node: Any) -> Tensor | None:
    found = net.value(node)
    return None if found is None or found.dim() != 1 else found.double()


def _negate_inputs(net: Net, product: fx.Node, turned: Tensor) -> None:
    """Turns the weights around in some channels of the input."""
    kept = keywords(product)
    words, groups = net.value(kept["weight_words"]), kept.get("groups", 1)
    assert words is not None
    rows = turned.view(groups, -1).to(torch.float32).mul(2).sub(1)  # +1 where turned
    mask = _PACK(rows, None, -1).repeat_interleave(words.shape[0] // groups, 0)
    mask = mask.view(len(mask), *[1] * (words.dim() - 2), -1)
    kept["weight_words"] = net.constant(words ^ mask, net.origin(kept["weight_words"]))
    product.kwargs = kept


def _join_equal(net: Net) -> None:
    """One node for signs of the same value with the same shift."""
    seen: dict[Any, fx.Node] = {}
    for pack in net.calls(_PACK, _POOL):
        given = arguments(pack)
        key = (pack.target, *(tuple(v) if isinstance(v, list) else v for v in given.values()))
        first = seen.setdefault(key, pack)
        if first is not pack:
            net.replace(pack, first)


def write_signs(net: Net) -> None:
    """Products whose signs are taken write them: alone, or beside the real value."""
    for product in net.calls(*PRODUCTS):
        if product.kwargs["dtype"] is torch.int32:
            continue
        packs = [u for u in product.users if is_call(u, _PACK) and u.args[0] is product
                 and _along_channels(u, product)]
        if not packs:
            continue
        shifts = [arguments(pack)["shift"] for pack in packs]
        shift = shifts[0]
        if isinstance(shift, fx.Node):
            if (value := vector_of(net, shift)) is None or len(value) != channels(product):
                continue
        same = [p for p, own in zip(packs, shifts, strict=True) if own is shift]
        alone = len(same) == len(product.users)
        kept = {k: v for k, v in product.kwargs.items()
                if not (alone and k in _UNPACKED_ONLY)}
        kept["sign_shift"] = shift
        if alone:
            _write_packed(net, product, same, kept)
        else:
            _write_both(net, product, same, kept)


def _along_channels(pack: fx.Node, product: fx.Node) -> bool:
    dim, rank = arguments(pack)["dim"], len(shape(product))
    return dim % rank == (1 if product.target is CONV else rank - 1)


def _write_packed(net: Net, product: fx.Node, packs: list[fx.Node], kept: dict[str, Any]) -> None:
    if not any(kept[n] is not None for n in ("residual", "slope", "shift_in", "shift_out")):
        kept["threshold"] = net.constant(_threshold(net, product, kept),
                                         net.origin(kept["weight_words"]) + ".threshold")
        for name in ("clamp_min", "clamp_max", "scale", "bias", "sign_shift"):
            kept[name] = None
    with net.graph.inserting_before(product):
        made = net.graph.call_function(_PACKED[product.target], (), kept)
    for pack in packs:
        net.replace(pack, made)
    net.graph.erase_node(product)


def _threshold(net: Net, product: fx.Node, kept: dict[str, Any]) -> Tensor:
    words = net.value(kept["weight_words"])
    assert words is not None
    taps = words.shape[1] * words.shape[2] if product.target is CONV else 1
    products = taps * (int(kept["channels"]) // kept.get("groups", 1))
    vectors = {n: net.value(kept[n]) for n in ("scale", "bias", "sign_shift")}
    return fold_threshold(products, clamp_min=kept["clamp_min"], clamp_max=kept["clamp_max"],
                          out_channels=channels(product), **vectors).to(words.device)


def _write_both(net: Net, product: fx.Node, packs: list[fx.Node], kept: dict[str, Any]) -> None:
    with net.graph.inserting_before(product):
        both = net.graph.call_function(_BOTH[product.target], (), kept)
        real = net.graph.call_function(operator.getitem, (both, 0))
        words = net.graph.call_function(operator.getitem, (both, 1))
    for pack in packs:
        net.replace(pack, words)
    net.replace(product, real)
