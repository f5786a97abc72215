"""A model in inference as a graph of operators, by torch.export."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from bitkernels.converter.net import Net, aten, fold_constants, shape
from bitkernels.converter.spellings import clamps_by_where, respell

_SAME = (aten.detach.default, aten.alias.default, aten.clone.default)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
             aten.feature_alpha_dropout.default)
_HINTS = {  # for a user of the model, by what torch.export's reason has in it
    "fake tensor": "; the model may keep what it computes in its attributes or write to .data of "
                   "its weights or input",
    "is mutated in the forward": "; leave out in evaluation what the model counts or keeps",
    "Could not guard on data-dependent": "; the model may branch on values of a tensor, as in `if "
                                         "self.temperature < 1e-7`, or count by them: a graph has "
                                         "one way, so leave the one that evaluation takes",
    "numpy() is not supported": "; the model computes with NumPy, of which a graph knows nothing",
}
_one_at_a_time = threading.RLock()  # torch.export and its tensors share state of the process


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """No gradients, no autocast and no inference mode, whatever the caller is in; one thread.

    A graph has the types of the model, not those of an autocast around the call, and tensors of
    inference mode have no version by which the engine sees that they were written to.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Net:
    """The graph of the model in evaluation, functional; see `Net`. Called inside `neutral`.

    dynamic_shapes: as of torch.export.export; None: the first size of every tensor may vary, but
      for tensors of first size 1 beside others.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"convert: model must be the torch.nn.Module that {name} was made of, for "
                         "torch.export takes no ScriptModule")
    varies = dynamic_shapes is None
    try:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:
        hint = ("; where a weight is made of others, as in pruning, call the model once under "
                "torch.no_grad() before" if "deepcopy protocol" in str(error) else "")
        raise ValueError(f"convert: {name} cannot be copied (copy.deepcopy: "
                         f"{type(error).__name__}: {error}){hint}") from error
    if dynamic_shapes is None:
        example_inputs, dynamic_shapes = _batches(example_inputs)
    try:
        program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
        if any(_writes(node) for node in program.graph.nodes):
            program = program.run_decompositions({})  # the same operators, none in place
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or "no reason"
        hint = next((hint for sign, hint in _HINTS.items() if sign in reason), "")
        if varies and "specialized" in reason:
            hint = ("; where the first size of an input is always the same, say so by "
                    "dynamic_shapes, as of torch.export")
        raise ValueError(f"convert: {name} cannot be exported for these example_inputs "
                         f"(torch.export: {type(error).__name__}: {reason}){hint}") from error
    _check_writes(name, program.graph_signature)
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
    if net.calls(aten.as_strided.default):
        raise ValueError(f"convert: {name} calls as_strided, whose result depends on the order of "
                         "values in memory, which convert changes")
    for node in net.calls(aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default  # images become channels-last, which a view may not fit
    for node in net.calls(*_SAME, aten.reshape.default):
        source: Any = node.args[0]
        if source.op != "placeholder" and shape(source) == shape(node):
            net.replace(node, source)
    for node in net.calls(*_DROPOUTS):
        if not node.args[2]:
            net.replace(node, node.args[0])  # type: ignore[arg-type]
    for node in net.calls(aten._assert_tensor_metadata.default, aten._assert_scalar.default):
        net.graph.erase_node(node)
    respell(net)
    net.graph.eliminate_dead_code()
    for name, _ in (*net.module.named_parameters(), *net.module.named_buffers()):
        net.names[name] = name
    fold_constants(net)
    clamps_by_where(net)
    return net


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _check_writes(name: str, signature: Any) -> None:
    for what, changed in (("buffer", signature.buffers_to_mutate),
                          ("input", signature.user_inputs_to_mutate)):
        if changed:
            raise ValueError(f"convert: {name} must not change its {what}s in evaluation, changes "
                             + ", ".join(changed.values()))


def _batches(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """The inputs, and that their first sizes vary: all of them, or those that are not 1.

    A batch of one is exported as a constant, so it becomes a batch of two here.
    """
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    for tensor in tensors:
        if not tensor.shape[0]:
            raise ValueError("convert: example_inputs must hold a batch of at least 1, got a "
                             f"tensor of shape {tuple(tensor.shape)}")
    if all(t.shape[0] == 1 for t in tensors):
        def two(value: Any) -> Any:
            return (value.expand(2, *value.shape[1:]).contiguous()
                    if isinstance(value, Tensor) and value.dim() else value)

        inputs = tree_map(two, inputs)
    shapes = torch.export.ShapesCollection()
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[0] != 1:
            shapes[tensor] = {0: torch.export.Dim.DYNAMIC}
    return inputs, shapes
