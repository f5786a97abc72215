"""The order of a model's calls as torch.fx graphs, without leaving a trace in the model.

`parts` reads the code symbolically, or runs it once on example inputs. Both give graphs of the same
form: a node for each call of a leaf module and each function between them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from bitkernels.nn.packed import _Packed

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, _Packed)
FEW = 128  # channels whose signs a 1x1 convolution cannot make much of


def is_depthwise(module: Any) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def is_expansion(module: Any) -> bool:
    """A 1x1 convolution of few channels to at least twice as many."""
    return (isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1}
            and module.in_channels < FEW and module.out_channels >= 2 * module.in_channels)


@dataclass
class Part:
    """The graph of one module of the model. `name` is its path: "" if it is the whole model.

    Nodes of tensors that the code makes itself have them as meta["constant"].
    """

    name: str
    root: nn.Module
    graph: fx.Graph

    def module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def path(self, node: fx.Node) -> str:
        return f"{self.name}.{node.target}" if self.name else str(node.target)


def parts(model: nn.Module, example_inputs: Any = None) -> list[Part]:
    """The graph of the model, or of as large parts of it as can be traced, outermost first.

    With `example_inputs` (a tensor, a tuple of arguments or a dict of named ones) the model is run
    once, and an error of that run is raised. The model is afterwards as it was: attributes,
    buffers, training flags, random numbers.
    """
    while True:  # what is around the model does nothing to its values
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    with _undisturbed(model):
        if example_inputs is not None:
            return [_recorded(model, example_inputs)]
        model.train()  # auxiliary heads are called in training only
        found = _Symbolic().visit("", model)
    return sorted(found, key=lambda part: part.name.count(".") + bool(part.name))


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    inner = ("_parameters", "_buffers", "_modules")
    saved = [(m, dict(m.__dict__), {key: dict(m.__dict__[key]) for key in inner})
             for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, attributes, dicts in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, values in dicts.items():
                attributes[key].clear()
                attributes[key].update(values)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _is_leaf(module: nn.Module) -> bool:
    home = type(module).__module__
    return isinstance(module, LAYERS) or (
        home.startswith(("torch.nn", "torch.ao.nn", "bitkernels.nn", "bitkernels.quantizers"))
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)))


class _ReadParameter(fx.proxy.ParameterProxy):
    """A parameter that the code of a parent reads. Asking for its type is not yet a read."""

    dtype = property(lambda self: self.param.dtype)
    device = property(lambda self: self.param.device)
    requires_grad = property(lambda self: self.param.requires_grad)


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.opaque or _is_leaf(m)

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        return m.forward(*args, **kwargs)  # without the hooks, which are the user's code

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]):
        if isinstance(attr_val, nn.Parameter):
            for name, parameter in self.root.named_parameters():
                if parameter is attr_val and name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy(
                        "get_attr", name, (), {},
                        proxy_factory_fn=lambda node, name=name: _ReadParameter(  # type: ignore
                            self, node, name, attr_val))
                if parameter is attr_val:
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Symbolic:
    """Traces a module; where that fails its children, and then it again with those that fail as
    leaves. What still fails is a leaf of its parent's graph."""

    def __init__(self) -> None:
        self.opaque: dict[int, str] = {}
        self.visited: set[int] = set()

    def _trace(self, module: nn.Module) -> fx.Graph | None:
        try:
            parameters = inspect.signature(type(module).forward).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            graph = _Tracer(set(self.opaque)).trace(module, concrete_args=defaults or None)
        except Exception:  # whatever the user's code raises when given a proxy
            return None
        for node in graph.nodes:  # attributes of the module that it will not keep
            if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
                node.meta["constant"] = getattr(module, str(node.target))
        return graph

    def visit(self, name: str, module: nn.Module) -> list[Part]:
        if id(module) in self.visited or (name and _is_leaf(module)):
            return []
        self.visited.add(id(module))
        graph = self._trace(module)
        if graph is not None:
            return [Part(name, module, graph)]
        before, below = len(self.opaque), []
        for key, child in module.named_children():
            below += self.visit(f"{name}.{key}" if name else key, child)
        if len(self.opaque) > before:
            graph = self._trace(module)
        if graph is None:
            self.opaque[id(module)] = name
            return below
        hidden = tuple(f"{path}." for path in self.opaque.values())
        return [Part(name, module, graph), *(p for p in below if p.name.startswith(hidden))]


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph, self.depth = fx.Graph(), 0
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # an id stays that of its tensor
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b) for b in model.buffers()}

    def node_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.nodes:
                name = self.parameters.get(id(value), "constant")
                node = self.graph.create_node("get_attr", name)
                if name == "constant" and id(value) not in self.buffers:
                    node.meta["constant"] = value
                self.define(node, value)
            return self.nodes[id(value)]
        return value if isinstance(value, (int, float, str)) else None

    def define(self, node: fx.Node, values: Any) -> None:
        for value in tree_flatten(values)[0]:
            if isinstance(value, Tensor):
                self.nodes[id(value)] = node
                self.alive.append(value)

    def call(self, op: str, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        if any(isinstance(value, Tensor) for value in tree_flatten(out)[0]):
            args, kwargs = tree_map(self.node_of, (tuple(args), dict(kwargs)))
            self.define(self.graph.create_node(op, target, args, kwargs), out)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.depth:
            self.call("call_function", func, args, kwargs or {}, out)
        return out


def _recorded(model: nn.Module, example_inputs: Any) -> Part:
    recorder = _Recorder(model)

    def enter(module, args, kwargs):
        recorder.depth += 1

    def leave(name, module, args, kwargs, out):
        recorder.depth -= 1
        if not recorder.depth:
            recorder.call("call_module", name, args, kwargs, out)

    hooks, inside = [], set()
    for name, module in model.named_modules():
        if name and module not in inside and _is_leaf(module):
            inside |= set(module.modules())
            hooks += [module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                      module.register_forward_hook(
                          lambda *call, name=name: leave(name, *call), with_kwargs=True)]
    args: tuple = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = {}
    if isinstance(example_inputs, dict):
        args, kwargs = (), example_inputs
    for i, value in enumerate(tree_flatten((args, kwargs))[0]):
        if isinstance(value, Tensor):
            recorder.define(recorder.graph.placeholder(f"input_{i}"), value)
    try:
        with recorder:
            out = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    recorder.graph.output(tree_map(recorder.node_of, tree_flatten(out)[0]))
    return Part("", model, recorder.graph)
