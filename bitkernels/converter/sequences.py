"""Sequences (N, C, L) stay images of one row from one product to the next."""

from __future__ import annotations

from typing import Any

from torch import fx

from bitkernels.converter.net import Net, arguments, aten, is_call, new_call, ops, shape

# Whose value at a place depends on the value there alone, and on its channel.
_BY_VALUE = (aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
             aten.leaky_relu.default, aten.prelu.default, aten.batch_norm.default,
             aten.neg.default, aten.sigmoid.default, aten.silu.default, aten.gelu.default,
             aten.hardswish.default, aten.tanh.default, ops.rprelu.default, ops.rsign.default)
_BROADCAST = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_POOLS = {aten.max_pool1d.default: aten.max_pool2d.default,
          aten.avg_pool1d.default: aten.avg_pool2d.default,
          aten.adaptive_avg_pool1d.default: aten.adaptive_avg_pool2d.default}
_OF_WINDOWS = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1,
               "output_size": 1}  # along the one row


def lift_sequences(net: Net) -> None:
    """A row is taken out of its image behind what follows a product, not in front of it.

    So norms, activations, sums and pools of sequences are those of images, which go into products,
    and what the next product would make an image of is one already.
    """
    waiting = [node for node in net.calls(aten.squeeze.dim) if _image(node) is not None]
    while waiting:
        row = waiting.pop()
        for user in list(row.users):
            made = _lifted(net, user, row)
            if made is not None:
                net.replace(user, made)
                if is_call(made, aten.squeeze.dim):
                    waiting.append(made)
    net.graph.eliminate_dead_code()


def _image(node: Any) -> fx.Node | None:
    """The image of one row that a sequence was taken out of."""
    if not is_call(node, aten.squeeze.dim):
        return None
    image, dim = node.args
    sizes = shape(image)
    return image if len(sizes) == 4 and dim in (2, -2) and sizes[2] == 1 else None


def _lifted(net: Net, user: fx.Node, row: fx.Node) -> fx.Node | None:
    """What a call makes of the image in place of the sequence."""
    image = _image(row)
    assert image is not None
    if is_call(user, aten.unsqueeze.default) and user.args[1] in (2, -2):
        return image
    if is_call(user, *_BY_VALUE):
        if row in user.args[1:] or row in user.kwargs.values():
            return None
        return _row(user, user.target, image, *user.args[1:], **user.kwargs)
    if is_call(user, *_BROADCAST):
        others = [_as_image(net, user, n) for n in user.args[:2]]
        return None if None in others or user.kwargs else _row(user, user.target, *others)
    if user.target in _POOLS and user.args[0] is row:
        given: dict[str, Any] = arguments(user)
        for name, along in _OF_WINDOWS.items():
            if given.get(name):
                given[name] = [along, *given[name]]
        return _row(user, _POOLS[user.target], image, *list(given.values())[1:])
    return None


def _as_image(net: Net, before: fx.Node, value: Any) -> Any:
    """One side of arithmetic with a sequence, which broadcasts to an image as it did to it."""
    if not isinstance(value, fx.Node):
        return value
    if (image := _image(value)) is not None:
        return image
    rank = len(shape(value))
    if rank < 2 or rank > 3:
        return value if rank < 2 else None
    constant = net.value(value)
    if constant is not None:
        return net.constant(constant.unsqueeze(rank - 1), net.origin(value))
    return new_call(before, aten.unsqueeze.default, value, 2) if rank == 3 else None


def _row(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node | None:
    made = new_call(before, target, *args, **kwargs)
    row = new_call(before, aten.squeeze.dim, made, 2)
    return row if shape(row) == shape(before) else None
