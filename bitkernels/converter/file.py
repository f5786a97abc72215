"""A converted network in one file: safetensors, with the graph as JSON in its metadata.

Metadata, all strings; readers ignore keys that they do not know:
  format          "bitkernels.converted"
  format_version  "1"; a reader refuses a larger one
  bitkernels      the version that wrote the file
  graph           JSON: {"inputs": [[name, dtype, sizes, sizes of the example]], "nodes": [[name,
                  target, args, kwargs]], "output": ..., "in_spec", "out_spec": trees of torch's
                  pytree}; a size that may vary is a name
  report          JSON: the fields of ConvertReport
A node calls an operator of ATen or of this package that takes and gives tensors and changes none,
or arithmetic on sizes. The tensors are the constants, under the names that the nodes read. No code
is in the file; trees are of tuples, lists and dictionaries.
"""

from __future__ import annotations

import json
import operator
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, treespec_dumps, treespec_loads

from bitkernels._files import replace_file
from bitkernels._packages import needs
from bitkernels.converter.converted import Converted
from bitkernels.converter.inputs import Input
from bitkernels.converter.report import ConvertReport, Product

FORMAT = "bitkernels.converted"
VERSION = 1
_VERSIONS = tuple(map(str, range(1, VERSION + 1)))  # that this reader knows
_SIZES = {f"size.{f.__name__}": f for f in (operator.add, operator.sub, operator.mul,
                                            operator.floordiv, operator.mod, operator.getitem)}
_NAMES = {f: name for name, f in _SIZES.items()}
_TYPES: dict[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format,
                           "layout": torch.layout}
_MADE_OF_NOTHING = ("aten.arange", "aten.empty", "aten.eye", "aten.full", "aten.linspace",
                    "aten.ones", "aten.rand", "aten.randn", "aten.scalar_tensor", "aten.zeros")
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def save_converted(network: Converted, path: str | os.PathLike) -> None:
    """Write a network that `convert` returned: 1 bit a binary weight, and the graph, no pickle.

    `load_converted` gives it back without the model's code. The file is the old one or the new
    one, also after a crash.

    Raises ValueError for another module and for a graph with calls that a file cannot hold;
    OSError where the file cannot be written; ImportError without the package safetensors.
    """
    if not isinstance(network, Converted):
        raise ValueError("save_converted: network must be what bitkernels.convert(model) returns, "
                         f"got {type(network).__name__}")
    safetensors = _safetensors()
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, t in network.graph_module.state_dict().items()}
    from bitkernels import __version__

    metadata = {"format": FORMAT, "format_version": str(VERSION), "bitkernels": __version__,
                "graph": json.dumps(_described(network)), "report": json.dumps(
                    asdict(network.report))}
    try:
        replace_file(Path(path), safetensors.save(tensors, metadata=metadata))
    except OSError as error:
        raise type(error)(error.errno, f"save_converted cannot write: {error.strerror}",
                          os.fspath(path)) from None


def load_converted(path: str | os.PathLike, device: str | torch.device = "cpu") -> Converted:
    """The network of a file that `save_converted` wrote, on a device.

    The whole graph is tried without values first, so a file that is broken, of a later format or
    not of `save_converted` is refused here: ValueError. FileNotFoundError; ImportError without the
    package safetensors.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(path):
        raise ValueError(f"load_converted: {path} is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"load_converted: {path} is not a safetensors file that can be read, or "
                         f"not a whole one: {error}") from None
    except FileNotFoundError:
        raise
    except OSError as error:  # an empty file cannot be mapped
        raise ValueError(f"load_converted: {path} cannot be read: {error}") from None
    try:
        described = json.loads(metadata["graph"])
        inputs = _inputs(described)
        _try_without_values(described, inputs, tensors)
        module = _module(described, inputs, tensors, torch.device(device))
        network = Converted(module, _report(json.loads(metadata["report"])), inputs,
                            _tree(described["in_spec"]), _tree(described["out_spec"]))
    except Exception as error:  # whatever a strange graph runs into
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"load_converted: {path} is broken: {type(error).__name__}: {reason}"
                         ) from None
    return network.to(device)


def _check_format(path: str | os.PathLike, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"load_converted: {path} is a safetensors file, but not one of "
                         f"save_converted: its format is {metadata.get('format')!r}, not "
                         f"{FORMAT!r}")
    version = metadata.get("format_version", "")
    if version not in _VERSIONS:
        raise ValueError(f"load_converted: {path} has format version {version!r}, written by "
                         f"bitkernels {metadata.get('bitkernels')}; this one reads up to {VERSION}"
                         ": update it")


def _described(network: Converted) -> dict[str, Any]:
    inputs, nodes, output = [], [], None
    for input in network.inputs:
        if input.dtype is None:
            raise ValueError(f"save_converted: the input {input.name} is no tensor")
        inputs.append([input.name, _plain(input.dtype), input.sizes, input.example])
    for node in network.graph_module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            nodes.append([node.name, "constant", [network.words_of(str(node.target))], {}])
        elif node.op == "call_function":
            nodes.append([node.name, _target_name(node), _plain(node.args), {
                key: _plain(value) for key, value in node.kwargs.items()}])
        else:
            output = _plain(node.args[0])
    return {"inputs": inputs, "nodes": nodes, "output": output,
            "in_spec": _dumped(network.in_spec), "out_spec": _dumped(network.out_spec)}


def _target_name(node: fx.Node) -> str:
    if node.target in _NAMES:
        return _NAMES[node.target]
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    raise ValueError(f"save_converted: a file cannot hold the call of {node.target}")


def _target(name: str) -> Any:
    if name in _SIZES:
        return _SIZES[name]
    namespace, packet, overload = name.split(".")
    if namespace not in ("aten", "bitkernels"):
        raise ValueError(f"a call of {name}")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(found, torch._ops.OpOverload) or not _is_harmless(found):
        raise ValueError(f"a call of {name}")
    return found


def _is_harmless(call: torch._ops.OpOverload) -> bool:
    """Whether it does nothing but make tensors: aten.save and aten.from_file change nothing that
    a schema tells, but files."""
    schema: Any = call._schema
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return not schema.is_mutable and bool(schema.returns) and (
        takes or str(call.overloadpacket) in _MADE_OF_NOTHING)


def _plain(value: Any) -> Any:
    """An argument for JSON: nodes as {"node": name}, types of torch as {"dtype": name}, ..."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    for kind, cls in _TYPES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"save_converted: a file cannot hold the argument {value!r}")


def _argument(value: Any, nodes: dict[str, fx.Node], device: torch.device | None = None) -> Any:
    """`_plain` undone; the device of the file is the one that the network is loaded to."""
    if isinstance(value, list):
        return [_argument(v, nodes, device) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, name), = value.items()
    if kind == "node":
        return nodes[name]
    if kind == "device" and name == "cpu":
        return device
    found = getattr(torch, name)
    if not isinstance(found, _TYPES[kind]):
        raise ValueError(f"{name} is no {kind}")
    return found


def _inputs(described: dict[str, Any]) -> tuple[Input, ...]:
    found = tuple(Input(name, _argument(dtype, {}), tuple(sizes), tuple(example))
                  for name, dtype, sizes, example in described["inputs"])
    for input in found:
        if len(input.sizes) != len(input.example) or any(
                not isinstance(n, (int, str)) or isinstance(n, int) and n != m
                for n, m in zip(input.sizes, input.example, strict=True)):
            raise ValueError(f"the sizes of {input.name} do not fit its example")
    return found


def _module(described: dict[str, Any], inputs: tuple[Input, ...], tensors: dict[str, Tensor],
            device: torch.device) -> fx.GraphModule:
    graph, nodes, root = fx.Graph(), {}, torch.nn.Module()
    for input in inputs:
        nodes[input.name] = graph.placeholder(input.name)
    for name, target, args, kwargs in described["nodes"]:
        if target == "constant":
            key, = args
            root.register_buffer(key, tensors[key])
            nodes[name] = graph.get_attr(key)
        else:
            call = _target(target)
            nodes[name] = graph.call_function(call, tuple(_argument(args, nodes, device)), {
                key: _argument(value, nodes, device) for key, value in kwargs.items()})
    graph.output(_argument(described["output"], nodes))
    graph.lint()
    for node in graph.nodes:  # the file holds them in one order
        if node.target is torch.ops.aten.conv2d.default:
            for used in node.all_input_nodes[1:2]:
                weight = getattr(root, str(used.target))
                setattr(root, str(used.target),
                        weight.contiguous(memory_format=torch.channels_last))
    return fx.GraphModule(root, graph, "Network")


def _try_without_values(described: dict[str, Any], inputs: tuple[Input, ...],
                        tensors: dict[str, Tensor]) -> None:
    """Runs the graph on tensors without memory, whatever sizes the file asks for."""
    on = torch.device("meta")
    module = _module(described, inputs, {key: t.to(on) for key, t in tensors.items()}, on)
    with on, torch.no_grad():
        module(*(torch.empty(input.example, dtype=input.dtype) for input in inputs))


def _report(fields: dict[str, Any]) -> ConvertReport:
    products = tuple(Product(**{**p, "epilogue": tuple(p["epilogue"])})
                     for p in fields.pop("products"))
    pairs: dict[str, Any] = {key: tuple(map(tuple, fields.pop(key))) for key in ("real", "others")}
    return ConvertReport(products, **pairs, **fields)


def _tree(text: str) -> TreeSpec:
    """A tree of torch's pytree, which imports modules by name for other types."""
    waiting = [json.loads(text)[1]]
    while waiting:
        spec = waiting.pop()
        if spec["type"] not in _TREES or "__enum__" in str(spec["context"]):
            raise ValueError(f"a tree of {spec['type']}")
        waiting += spec["children_spec"]
    return treespec_loads(text)


def _dumped(spec: TreeSpec) -> str:
    text = treespec_dumps(spec)
    try:
        _tree(text)
    except ValueError as error:
        raise ValueError(f"save_converted: a file cannot hold {error}, as the model takes or gives "
                         "it; tuples, lists and dictionaries it can") from None
    return text


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(needs("files of converted networks", "safetensors")) from None
    return safetensors.torch

