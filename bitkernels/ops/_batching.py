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

Places = dict[str, int]  # where the mapped dimension of an argument is
Rule = Callable[[Any, dict[str, Any], Places, int], Any]
_functorch: Any = torch._C._functorch


def _in_front(arguments: dict[str, Any], places: Places, names: tuple[str, ...], size: int) -> None:
    """Moves the mapped dimension of these arguments to the front; those without one repeat."""
    for name in names:
        value = arguments.get(name)
        if value is not None:
            arguments[name] = (value.movedim(places[name], 0) if name in places
                               else value.expand(size, *value.shape))


def each(op, arguments: dict[str, Any], places: Places, size: int):
    """A call for each element of the mapped dimension."""
    if size == 0:
        raise RuntimeError(f"{op}: torch.vmap over a dimension of size 0 has no result")
    results = [op(**{name: value.select(places[name], i) if name in places else value
                     for name, value in arguments.items()}) for i in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def rows(*names: str) -> Rule:
    """For operators of tensors of any rank: the mapped dimension is one more leading dimension."""

    def rule(op, arguments: dict[str, Any], places: Places, size: int):
        if not set(places) <= set(names):
            return each(op, arguments, places, size)
        _in_front(arguments, places, names, size)
        if arguments.get("dim", -1) >= 0:
            arguments["dim"] += 1
        out = op(**arguments)
        return (out, 0) if isinstance(out, Tensor) else (out, (0,) * len(out))

    return rule


def images(*names: str, unbatched: bool = False) -> Rule:
    """For operators of (N, ...) whose images do not meet: N of each image is N of all.

    With `unbatched` there may be one image without N, which gets one.
    """

    def rule(op, arguments: dict[str, Any], places: Places, size: int):
        if not set(places) <= set(names):
            return each(op, arguments, places, size)
        first = arguments[names[0]]
        single = unbatched and first.dim() - (names[0] in places) == 3
        _in_front(arguments, places, names, size)
        count = arguments[names[0]].shape[0 if single else 1]
        if not single:
            for name in names:
                if arguments.get(name) is not None:
                    arguments[name] = arguments[name].flatten(0, 1)
        outputs = op(**arguments)

        def split(out: Tensor) -> Tensor:
            return out if single else out.unflatten(0, (size, count))

        if isinstance(outputs, Tensor):
            return split(outputs), 0
        # What is not asked for, such as the mask of binary_conv2d_forward, is empty.
        empty = [out.dim() == 1 for out in outputs]
        return (tuple(out if e else split(out) for out, e in zip(outputs, empty, strict=True)),
                tuple(None if e else 0 for e in empty))

    return rule


def per_sample(rule: Rule) -> Rule:
    """The rule, but where an operator's shift is one of each sample: samples are as images."""
    per_image = images("input", "shift")

    def either(op, arguments: dict[str, Any], places: Places, size: int):
        shift = arguments.get("shift")
        each_has_one = shift is not None and shift.dim() - ("shift" in places) > 1
        return (per_image if each_has_one else rule)(op, arguments, places, size)

    return either


def batched(op: torch._ops.OpOverload, rule: Rule) -> Callable[..., Any]:
    """A kernel of the FuncTorchBatched key."""
    names = [a.name for a in op._schema.arguments]

    def kernel(*args, **kw):
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

    return kernel
