"""What a converted network takes: types and sizes that its graph was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_unflatten


@dataclass(frozen=True)
class Input:
    """One input of a graph.

    dtype: of a tensor; None for another value, which is a constant of the graph: `value`.
    sizes: a number where the size is fixed, a name where it varies; equal names are equal sizes.
    example: the sizes of the example.
    """

    name: str
    dtype: torch.dtype | None
    sizes: tuple[int | str, ...] = ()
    example: tuple[int, ...] = ()
    value: Any = None


def inputs_of(graph: fx.Graph) -> tuple[Input, ...]:
    """The inputs of a graph that was captured."""
    return tuple(_input(node) for node in graph.nodes if node.op == "placeholder")


def _input(node: fx.Node) -> Input:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return Input(node.name, None, value=value)
    return Input(node.name, value.dtype,
                 tuple(n if isinstance(n, int) else str(n.node.expr) for n in value.shape),
                 tuple(n if isinstance(n, int) else int(n.node.hint) for n in value.shape))


def arguments_of(spec: TreeSpec) -> str:
    """What a call was given, with * for every value: "(*, {'a': *}, factor=*)"."""
    args, kwargs = tree_unflatten([_Star()] * spec.num_leaves, spec)
    text = ", ".join((*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())))
    return f"({text})" if len(text) <= 200 else f"({text[:200]} ...)"


class _Star:
    def __repr__(self) -> str:
        return "*"


def check_inputs(inputs: Sequence[Input], values: Sequence[Any]) -> None:
    """Raises RuntimeError for values that the graph was not made for."""
    bound: dict[str, int] = {}
    for input, value in zip(inputs, values, strict=True):
        if input.dtype is None:
            if not isinstance(input.value, torch.SymInt) and value != input.value:
                raise RuntimeError(f"Converted: {input.name} must be {input.value!r}, as in the "
                                   f"example_inputs of convert, got {value!r}")
            continue
        if not isinstance(value, Tensor):
            raise RuntimeError(f"Converted: {input.name} must be a tensor, got "
                               f"{type(value).__name__}")
        if value.is_nested or value.layout is not torch.strided:
            raise RuntimeError(f"Converted: {input.name} must be a dense tensor, got "
                               f"{'a nested one' if value.is_nested else _short(value.layout)}")
        wanted = tuple(bound.setdefault(n, m) if isinstance(n, str) else n
                       for n, m in zip(input.sizes, value.shape, strict=False))
        if value.dtype != input.dtype or len(input.sizes) != value.dim() or wanted != value.shape:
            sizes = ", ".join(str(bound[n]) if n in bound and bound[n] != m else str(n)
                              for n, m in zip(input.sizes, (*value.shape, *input.sizes),
                                              strict=False))
            raise RuntimeError(
                f"Converted: {input.name} must be {_short(input.dtype)} of shape ({sizes}), as in "
                f"the example_inputs of convert, got {_short(value.dtype)} of shape "
                f"{tuple(value.shape)}")


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
