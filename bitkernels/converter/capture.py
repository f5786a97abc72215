"""A model in inference as a graph of operators, by torch.export."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from bitkernels.converter.net import Net, aten, fold_constants


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Net:
    """The graph of the model in evaluation and without gradients, functional; see `Net`.

    dynamic_shapes: as of torch.export.export; None: the first size of every tensor may vary.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    example_inputs = tree_map(_of_two, example_inputs)
    if dynamic_shapes is None:
        dynamic_shapes = tree_map(_batch, example_inputs)
    name = type(model).__name__
    with torch.no_grad():
        try:
            program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "no reason")
            raise ValueError(f"convert: {name} cannot be exported for these example_inputs "
                             f"(torch.export: {type(error).__name__}: {reason})") from error
        if any(_writes(node) for node in program.graph.nodes):
            program = program.run_decompositions({})  # the same operators, none in place
        net = Net(program.module(check_guards=False))
    for node in net.calls(aten._native_batch_norm_legit_no_training.default):
        x, weight, bias, mean, var, momentum, eps = node.args
        for user in list(node.users):
            if user.args[1] != 0:
                continue
            with net.graph.inserting_before(user):
                norm = net.graph.call_function(aten.batch_norm.default, (
                    x, weight, bias, mean, var, False, momentum, eps, False))
            net.replace(user, norm)
    for node in net.calls(aten._assert_tensor_metadata.default, aten._assert_scalar.default):
        net.graph.erase_node(node)
    net.graph.eliminate_dead_code()
    for name, _ in (*net.module.named_parameters(), *net.module.named_buffers()):
        net.names[name] = name
    fold_constants(net)
    return net


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _of_two(value: Any) -> Any:
    """A batch of one is exported as a constant: two of it."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        return value.expand(2, *value.shape[1:]).contiguous()
    return value


def _batch(value: Any) -> Any:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) and value.dim() else None
