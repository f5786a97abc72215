"""A captured network: its graph, its constants, and how passes change them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

ops = torch.ops.bitkernels
aten = torch.ops.aten

CONV, LINEAR = ops.packed_conv2d.default, ops.packed_linear.default
PRODUCTS = (CONV, LINEAR)  # what the passes gather an epilogue in
WITH_WORDS = (CONV, ops.packed_conv2d.packed, ops.packed_conv2d.both,
              LINEAR, ops.packed_linear.packed, ops.packed_linear.both)
INT8 = (ops.int8_conv2d.default, ops.int8_linear.default)  # real layers, rounded
ROUNDED = 0.05  # of a weight's magnitude: by more, rounding has changed what it is
VECTORS = ("scale", "bias", "shift_in", "slope", "shift_out")


class Net:
    """The graph of a network in inference, functional, with constants as get_attr nodes.

    A product of bits is one node, `packed_conv2d` or `packed_linear`, whose arguments all stand in
    kwargs; a pass moves what follows it into them.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.names: dict[str, str] = {}  # of constants: from which parameter of the model
        # Constants made of torch.sign of a 0, as they were if that sign were 1.
        self.zeros_as_one: dict[fx.Node, Tensor] = {}

    def value(self, node: Any) -> Tensor | None:
        """The tensor of a constant, else None."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        found: Any = self.module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found.detach() if isinstance(found, Tensor) else None

    def constant(self, tensor: Tensor, name: str) -> fx.Node:
        """A new constant; `name` says what it is."""
        stem = name.replace(".", "_")
        key, count = stem, 1
        while hasattr(self.module, key):
            key, count = f"{stem}_{count}", count + 1
        self.module.register_buffer(key, tensor.detach())
        self.names[key] = name
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(key)
        node.meta["val"] = tensor.detach()
        return node

    def origin(self, node: Any) -> str:
        """The parameter of the model that a constant was made of."""
        return self.names.get(str(node.target), str(node.target))

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        new.meta.setdefault("val", old.meta.get("val"))
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def calls(self, *targets: Any) -> list[fx.Node]:
        return [n for n in self.graph.nodes if is_call(n, *targets)]

    def flatten(self) -> None:
        """Constants as buffers of one module, whatever the model's modules were."""
        flat: dict[str, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and str(node.target) not in dict(self.module._buffers):
                value = self.value(node)
                if value is None or not node.users:
                    continue
                if str(node.target) not in flat:
                    flat[str(node.target)] = self.constant(value, self.origin(node))
                self.replace(node, flat[str(node.target)])

    def clean(self) -> None:
        """Drops what nothing uses."""
        self.graph.eliminate_dead_code()
        kept = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        for name in [n for n, _ in (*self.module.named_parameters(remove_duplicate=False),
                                    *self.module.named_buffers(remove_duplicate=False))]:
            if name not in kept:
                owner, _, key = name.rpartition(".")
                delattr(self.module.get_submodule(owner), key)
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def new_call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in front of a node, and the tensor without values that it gives."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with before.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **named)
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, with the schema's defaults."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments}
    found |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return found | node.kwargs


def shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def device(node: fx.Node) -> torch.device:
    return node.meta["val"].device


def channels(product: fx.Node) -> int:
    return int(shape(product)[1 if product.target is CONV else -1])


def channels_second(product: fx.Node) -> bool:
    """Whether its channels stand where norms and PReLU look for them, not behind a sequence."""
    return product.target is CONV or len(shape(product)) == 2


def keywords(node: fx.Node) -> dict[str, Any]:
    """The arguments of a product, to change and to give back as its kwargs."""
    return dict(node.kwargs)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone uses this one, and uses it once."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    times = sum(n is node for n in _flat((user.args, user.kwargs)))
    return user if times == 1 else None


def _flat(tree: Any) -> Iterable[Any]:
    found: list[Any] = []
    tree_map(found.append, tree)
    return found


def norm_affine(net: Net, given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(factor, offset) of a batch norm in evaluation, float64; None where it is no constant."""
    values = {n: None if given[n] is None else net.value(given[n])
              for n in ("weight", "bias", "running_mean", "running_var")}
    if given["training"] or any(given[n] is not None and v is None for n, v in values.items()):
        return None
    mean, var = values["running_mean"], values["running_var"]
    if mean is None or var is None:
        return None
    factor = (var.double() + given["eps"]).rsqrt()
    if values["weight"] is not None:
        factor = factor * values["weight"].double()
    offset = -mean.double() * factor
    return factor, offset if values["bias"] is None else offset + values["bias"].double()


def fold_constants(net: Net) -> None:
    """Computes what depends on constants alone, also with tensors that are made in the graph; what
    is made of nothing else, as zeros, stays there, for it may be large.

    Numbers that are taken from constants, as by `item`, stand in the calls that read them then.

    A straight-through form (a - b) + b is a, which else would have another magnitude in each
    value, by the rounding of both steps.
    """
    filled: dict[fx.Node, Tensor] = {}  # what is made of nothing
    others: dict[fx.Node, Any] = {}  # numbers, and several tensors of one call
    origins: dict[fx.Node, str] = {}  # of these
    differences: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # what each is the difference of
    with_ones: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # the same in net.zeros_as_one

    def value(node: Any) -> Any:
        return others[node] if node in others else filled.get(node, net.value(node))

    def one_value(node: Any) -> Any:
        return net.zeros_as_one[node] if node in net.zeros_as_one else value(node)

    for node in list(net.graph.nodes):
        inputs = node.all_input_nodes
        if not _can_fold(node) or any(value(n) is None for n in inputs):
            continue
        made, parts = _folded(node, value, differences)
        constants = [n for n in inputs if n not in filled]
        largest = max(constants, key=lambda n: getattr(value(n), "nbytes", 0), default=node)
        name = origins.get(largest) or net.origin(largest)
        if not isinstance(made, Tensor):
            if constants:
                others[node], origins[node] = made, name
            continue
        if not constants:
            filled[node] = made
            continue
        constant = net.constant(made, name)
        if parts is not None:
            differences[constant] = parts
        if is_call(node, aten.sign.default) or any(n in net.zeros_as_one for n in inputs):
            ones, parts = _folded(node, one_value, differences | with_ones)
            if is_call(node, aten.sign.default) and _are_by_chance(one_value(node.args[0])):
                ones = torch.where(ones == 0, 1, ones)
            if isinstance(ones, Tensor) and not torch.equal(ones, made):
                net.zeros_as_one[constant] = ones
                if parts is not None:
                    with_ones[constant] = parts
        net.replace(node, constant)
    for node, number in others.items():
        if isinstance(number, (bool, int, float)):
            _write_number(node, number)


def _folded(node: fx.Node, value: Any, differences: dict[fx.Node, tuple[Tensor, Tensor]],
            ) -> tuple[Any, tuple[Tensor, Tensor] | None]:
    """What a call makes of constants; and, if it is a difference of two tensors, these two."""
    target: Any = node.target
    with torch.no_grad():
        made = target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return made, None
    a, b = (value(n) if isinstance(n, fx.Node) else None for n in node.args)
    if node.target is aten.add.Tensor:
        for difference, other in zip(node.args, (b, a), strict=True):
            if difference in differences:
                made = _straight_through(made, differences[difference], other)  # type: ignore[index]
    elif node.target is aten.sub.Tensor and isinstance(a, Tensor) and isinstance(b, Tensor):
        return made, (a, b)
    return made, None


def _are_by_chance(tensor: Tensor) -> bool:
    """Whether the zeros of a tensor are a few among many values, as in latent weights, and not one
    of a few steps, as where signs are added for ternary weights."""
    zeros = tensor == 0
    return float(zeros.double().mean()) <= 0.01 and len(tensor[~zeros].abs().unique()) >= 16


def _can_fold(node: fx.Node) -> bool:
    """Whether a call gives the same for the same constants: of an operator that changes nothing
    and draws no random numbers, or arithmetic on the numbers of others."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
    return not (node.target._schema.is_mutable or "empty" in node.target._schema.name
                or torch.Tag.nondeterministic_seeded in node.target.tags)


def _write_number(node: fx.Node, number: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs),
                                            lambda n: number if n is node else n)


def _straight_through(made: Tensor, difference: tuple[Tensor, Tensor],
                      other: Tensor | None) -> Tensor:
    """`made` is the sum of a difference a - b and another tensor; a, if that is b, and so small
    that the sum is a but for rounding."""
    if other is None or made.shape != difference[0].shape:
        return made
    a, b = difference
    same = made.dtype == a.dtype and b.shape == other.shape and torch.equal(b, other)
    return a if same and bool(((made - a).abs() <= ROUNDED * a.abs()).all()) else made

