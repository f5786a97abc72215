"""Batching rules of the operators, for `torch.vmap` and the per-sample gradients of `torch.func`.

A rule gets the arguments by name and, of those that have the mapped dimension, where it is. Where
an operator treats each of its images or rows by itself, the mapped dimension joins them and one
call does the work. Where weights, shifts or sums over the batch depend on it, there is a call for
each of its elements, and the results are stacked: what torch does without a rule, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitkernels._ops import LIB

Places = dict[str, int]  # where the mapped dimension of an argument is
_functorch: Any = torch._C._functorch


def _in_front(arguments: dict[str, Any], places: Places, names: tuple[str, ...], size: int) -> None:
    """Moves the mapped dimension of these arguments to the front; those without one repeat."""
    for name in names:
        value = arguments.get(name)
        if value is not None:
            arguments[name] = (value.movedim(places[name], 0) if name in places
                               else value.expand(size, *value.shape))


def _each(op, arguments: dict[str, Any], places: Places, size: int):
    """A call for each element of the mapped dimension."""
    if size == 0:
        raise RuntimeError(f"{op}: torch.vmap over a dimension of size 0 has no result")
    results = [op(**{name: value.select(places[name], i) if name in places else value
                     for name, value in arguments.items()}) for i in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _all_rows(*names: str):
    """For operators of tensors of any rank: the mapped dimension is one more leading dimension."""

    def rule(op, arguments: dict[str, Any], places: Places, size: int):
        if not set(places) <= set(names):
            return _each(op, arguments, places, size)
        _in_front(arguments, places, names, size)
        if arguments.get("dim", -1) >= 0:
            arguments["dim"] += 1
        out = op(**arguments)
        return (out, 0) if isinstance(out, Tensor) else (out, (0,) * len(out))

    return rule


def _all_images(*names: str):
    """For operators of (N, ...) whose images do not meet: N of each image is N of all.

    An image without N (`SINGLE`) gets one.
    """

    def rule(op, arguments: dict[str, Any], places: Places, size: int):
        if not set(places) <= set(names):
            return _each(op, arguments, places, size)
        first = arguments[names[0]]
        single = op._opname in SINGLE and first.dim() - (names[0] in places) == 3
        _in_front(arguments, places, names, size)
        images = arguments[names[0]].shape[0 if single else 1]
        if not single:
            for name in names:
                if arguments.get(name) is not None:
                    arguments[name] = arguments[name].flatten(0, 1)
        outputs = op(**arguments)

        def split(out: Tensor) -> Tensor:
            return out if single else out.unflatten(0, (size, images))

        if isinstance(outputs, Tensor):
            return split(outputs), 0
        # What is not asked for, such as the mask of binary_conv2d_forward, is empty.
        empty = [out.dim() == 1 for out in outputs]
        return (tuple(out if e else split(out) for out, e in zip(outputs, empty, strict=True)),
                tuple(None if e else 0 for e in empty))

    return rule


def _shifted(rule: Callable):
    """The rule, but where an operator's shift is one of each sample: samples are as images."""
    images = _all_images("input", "shift")

    def either(op, arguments: dict[str, Any], places: Places, size: int):
        shift = arguments.get("shift")
        per_sample = shift is not None and shift.dim() - ("shift" in places) > 1
        return (images if per_sample else rule)(op, arguments, places, size)

    return either


SINGLE = ("binary_conv2d", "binary_conv_transpose2d")

RULES: dict[str, Callable] = {
    "sign_pack": _shifted(_all_rows("input")),
    "sign_pack_mask": _shifted(_all_rows("input")),
    "mask_grad": _all_rows("grad", "mask_words"),
    "unpack": _all_rows("words"),
    "tile_weight": _each,
    "packed_conv2d": _all_images("words", "residual"),
    "packed_conv2d.packed": _all_images("words", "residual"),
    "packed_conv2d.both": _all_images("words", "residual"),
    "packed_conv_transpose2d": _all_images("words"),
    "packed_linear": _all_rows("words", "residual"),
    "packed_linear.packed": _all_rows("words", "residual"),
    "packed_linear.both": _all_rows("words", "residual"),
    "packed_max_pool2d": _all_images("words"),
    "binary_conv2d": _all_images("input"),
    "binary_conv2d.padding": _all_images("input"),
    "binary_conv2d_forward": _all_images("input"),
    "binary_conv_transpose2d": _all_images("input"),
    "binary_linear": _all_rows("input"),
    "rsign": _shifted(_all_images("input")),
    "rprelu": _all_images("input"),
    "packed_conv2d_input_grad": _all_images("grad"),
    # Sums over a batch, and statistics of one, are those of each element.
    "rprelu_backward": _each,
    "sign_backward": _each,
    "packed_conv2d_weight_grad": _each,
    "packed_conv2d_moments": _each,
    "binary_residual_block": _each,
    "residual_block_forward": _each,
    "residual_block_backward": _each,
    "residual_block_norm_backward": _each,
}


def _kernel(op: torch._ops.OpOverload, rule: Callable):
    names = [a.name for a in op._schema.arguments]

    def batched(*args, **kw):
        level = _functorch.maybe_current_level()
        size, places = 0, {}
        arguments = dict(zip(names, args, strict=False), **kw)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                value, at = _functorch._unwrap_batched(value, level)
                arguments[name] = value
                if at is not None:
                    places[name], size = at, value.shape[at]
        with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)):
            if not places:
                return op(**arguments)
            outputs, dims = rule(op, arguments, places, size)

        def wrapped(out: Tensor, dim: int | None) -> Tensor:
            return out if dim is None else _functorch._add_batch_dim(out, dim, level)

        if isinstance(outputs, Tensor):
            return wrapped(outputs, dims)
        return tuple(map(wrapped, outputs, dims))

    return batched


for _name, _rule in RULES.items():
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.bitkernels, _packet), _overload or "default")
    LIB.impl(_name, _kernel(_op, _rule), "FuncTorchBatched")
