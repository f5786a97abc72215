"""The graph of a converted network as JSON, and back: what its file and the C++ engine read.

  {"inputs": [[name, dtype, sizes, sizes of the example]],
   "nodes": [[name, target, args, kwargs]], "output": ..., "in_spec", "out_spec"}

A size that may vary is a name; the specs are trees of torch's pytree, of tuples, lists and
dictionaries. A node calls an operator of ATen or of this package that takes and gives tensors and
changes none, or arithmetic on sizes; its constants are tensors beside the graph, by name. There is
no code in it.
"""

from __future__ import annotations

import json
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, treespec_dumps, treespec_loads

from bitkernels.converter.inputs import Input

if TYPE_CHECKING:
    from bitkernels.converter.converted import Converted

FORMAT = "bitkernels.converted"
VERSION = 1
_SIZES = {f"size.{f.__name__}": f for f in (operator.add, operator.sub, operator.mul,
                                            operator.floordiv, operator.mod, operator.getitem)}
_NAMES = {f: name for name, f in _SIZES.items()}
_TYPES: dict[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format,
                           "layout": torch.layout}
_MADE_OF_NOTHING = ("aten.arange", "aten.empty", "aten.eye", "aten.full", "aten.linspace",
                    "aten.ones", "aten.rand", "aten.randn", "aten.scalar_tensor", "aten.zeros")
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def metadata_of(network: Converted, trees: bool = True) -> dict[str, str]:
    """The strings of a file of `save_converted` that say what to compute. ValueError for calls
    that a file cannot hold. Without `trees` for the engine, which takes and gives lists."""
    described = describe(network)
    if trees:
        described |= {"in_spec": _dumped(network.in_spec), "out_spec": _dumped(network.out_spec)}
    return {"format": FORMAT, "format_version": str(VERSION), "graph": json.dumps(described)}


def describe(network: Converted) -> dict[str, Any]:
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
    return {"inputs": inputs, "nodes": nodes, "output": output}


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


def inputs_of_file(described: dict[str, Any]) -> tuple[Input, ...]:
    found = tuple(Input(name, _argument(dtype, {}), tuple(sizes), tuple(example))
                  for name, dtype, sizes, example in described["inputs"])
    for input in found:
        if len(input.sizes) != len(input.example) or any(
                not isinstance(n, (int, str)) or isinstance(n, int) and n != m
                for n, m in zip(input.sizes, input.example, strict=True)):
            raise ValueError(f"the sizes of {input.name} do not fit its example")
    return found


def module_of(described: dict[str, Any], inputs: tuple[Input, ...], tensors: dict[str, Tensor],
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
                if used.op == "get_attr":  # and no weight that the network computes
                    weight = getattr(root, str(used.target))
                    setattr(root, str(used.target),
                            weight.contiguous(memory_format=torch.channels_last))
    return fx.GraphModule(root, graph, "Network")


def tree_of(text: str) -> TreeSpec:
    """A tree of torch's pytree, which imports modules by name for other types."""
    waiting = [json.loads(text)[1]]
    while waiting:
        spec = waiting.pop()
        if spec["type"] not in _TREES or "__enum__" in str(spec["context"]):
            raise ValueError(f"a tree of {spec['type']}")
        waiting += spec["children_spec"]
    return treespec_loads(text)


def _dumped(spec: TreeSpec) -> str:
    try:
        text = treespec_dumps(spec)
        tree_of(text)
    except NotImplementedError:  # torch knows no name for a type
        raise ValueError("save_converted: a file cannot hold named tuples or other types, as the "
                         "model takes or gives them; tuples, lists and dictionaries it can"
                         ) from None
    except ValueError as error:
        raise ValueError(f"save_converted: a file cannot hold {error}, as the model takes or gives "
                         "it; tuples, lists and dictionaries it can") from None
    return text


