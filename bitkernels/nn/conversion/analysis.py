"""What the graph of a model says about its layers: what reaches their signs, and their place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from bitkernels.nn.conversion.graph import LAYERS, Part, is_depthwise, is_expansion, parts
from bitkernels.nn.conversion.values import (
    is_gate,
    is_max,
    is_norm,
    is_pool,
    is_size,
    kind,
    module_kind,
    name_of,
)
from bitkernels.nn.source import read_by_source

_SAME_CHANNELS = ("relu", "relu6", "dropout", "add", "iadd", "mul", "imul", "contiguous", "clone")


@dataclass(frozen=True)
class Source:
    """An operation whose values cannot be negative: a module, or a function (module None).

    pooled: only the largest of several go on, few of which are negative even if others are.
    normed: a batch norm comes after it, whose running statistics center the values once trained.
    """

    name: str
    module: nn.Module | None = None
    gate: bool = False
    pooled: bool = False
    normed: bool = False


UNKNOWN = Source("not analysed")


@dataclass
class Analysis:
    """`sources` of a layer are those on the way to its sign, for some channels of it at least;
    UNKNOWN is among them where the way begins outside what could be traced. `raw` are the layers
    whose values reach it with no norm in between."""

    sources: dict[nn.Module, frozenset[Source]] = field(default_factory=dict)
    raw: dict[nn.Module, set[nn.Module]] = field(default_factory=lambda: defaultdict(set))
    channels: dict[nn.Module, set[int | None]] = field(default_factory=lambda: defaultdict(set))
    shortcuts: set[nn.Module] = field(default_factory=set)
    gates: set[nn.Module] = field(default_factory=set)
    expansions: set[nn.Module] = field(default_factory=set)  # in front of depthwise convolutions
    read: set[nn.Module] = field(default_factory=set)  # whose weight the code of a parent reads
    first: set[nn.Module] = field(default_factory=set)
    last: set[nn.Module] = field(default_factory=set)


def analyse(model: nn.Module, example_inputs: Any = None) -> Analysis:
    """Of a model, which is not changed. Raises what the model raises for `example_inputs`."""
    result = Analysis()
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    for part in parts(model, example_inputs):
        _Flow(part, result).run()
    for module in model.modules():
        # nn.TransformerEncoder* reads weights on its fused path only, which `binarize` turns off.
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder, *LAYERS)):
            result.read |= read_by_source(module, LAYERS)
    for name, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            _look_into_transformer(name, module, result)
    weights = {id(m._parameters.get("weight")): m for m in layers}
    for module in model.modules():  # a parent that holds the parameter too computes with it
        if not isinstance(module, (*LAYERS, nn.Embedding, nn.EmbeddingBag)):
            result.read |= {weights[id(p)] for p in module._parameters.values()
                            if p is not None and id(p) in weights}
    if not result.first:
        result.first |= set(layers[:1])
    if not result.last:
        result.last |= set(layers[-1:])
    return result


def _look_into_transformer(name: str, module: Any, result: Analysis) -> None:
    """What the code of PyTorch's layers does between their two linear ones."""
    activation, path = module.activation, f"{name}.activation".lstrip(".")
    sources = frozenset[Source]()
    if activation is nn.functional.relu:
        sources = frozenset([Source(path)])
    elif isinstance(activation, nn.Module) and module_kind(activation) == "source":
        sources = frozenset([Source(path, activation)])
    result.sources.setdefault(module.linear1, frozenset())
    result.sources.setdefault(module.linear2, sources)
    result.raw[module.linear2].add(module.linear1)


class _Flow:
    """One pass over the graph of a part, in the order of its calls."""

    def __init__(self, part: Part, result: Analysis) -> None:
        self.part, self.result = part, result
        self.sources: dict[fx.Node, frozenset[Source]] = {}
        self.raw: dict[fx.Node, frozenset[nn.Module]] = {}
        self.channels: dict[fx.Node, int | None] = {}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}  # whose values it takes, not sizes alone
        self.before: dict[fx.Node, int] = {}  # all nodes that a node depends on, as bits
        self.modules: dict[fx.Node, nn.Module | None] = {}
        self.analysed = set(result.sources)  # in a part around this one
        self.layers: list[fx.Node] = []  # calls of layers, and of leaves that have some inside

    def run(self) -> None:
        nodes = list(self.part.graph.nodes)
        sizes: set[fx.Node] = set()
        for i, node in enumerate(nodes):
            module = self.part.module(node) if node.op == "call_module" else None
            self.modules[node] = module
            if is_size(node, sizes):
                sizes.add(node)
            self.inputs[node] = [n for n in node.all_input_nodes if n not in sizes]
            self.before[node] = 1 << i
            for origin in self.inputs[node]:
                self.before[node] |= self.before[origin]
            self.sources[node] = self._sources(node, module)
            self.raw[node] = frozenset() if is_norm(node, module) else frozenset().union(
                *(self.raw[n] for n in self.inputs[node]))
            self.channels[node] = self._channels(node, module)
            if module is not None:
                self._called(node, module)
            elif node.op == "get_attr":
                self._read(node)
        for node in nodes:
            if name_of(node) in ("add", "iadd"):
                self._find_shortcut(node)
            elif name_of(node) in ("mul", "imul"):
                self._find_gate(node)
            elif is_depthwise(self.modules[node]):
                self._find_expansion(node)
        if not self.part.name:
            self._find_ends(nodes[-1])

    def _called(self, node: fx.Node, module: nn.Module) -> None:
        if kind(node, module) == "source":
            self.result.channels[module].add(self.channels[node])
        if any(isinstance(m, LAYERS) for m in module.modules()):
            self.layers.append(node)
        if not isinstance(module, LAYERS) or not self.inputs[node]:
            return
        self.result.raw[module] |= self.raw[node]
        self.raw[node] = frozenset([module])
        if module not in self.analysed:
            known = self.result.sources.get(module, frozenset())
            self.result.sources[module] = known | self.sources[self.inputs[node][0]]

    def _sources(self, node: fx.Node, module: nn.Module | None) -> frozenset[Source]:
        """Not of a layer's input but of the node's own values."""
        inputs = [self.sources[n] for n in self.inputs[node]]
        if node.op == "placeholder":
            return frozenset([UNKNOWN] if self.part.name else [])
        if node.op == "call_module" and module is not None and not inputs:
            return frozenset([UNKNOWN])
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            return frozenset(replace(s, normed=True) for s in inputs[0] if s != UNKNOWN)
        what = kind(node, module)
        if what == "source":
            gate = is_gate(node, module)
            name = self.part.path(node) if module is not None else name_of(node)
            # What is below 0 in front of it, once it is replaced, comes from before.
            return frozenset([Source(name, module, gate)]).union(*inputs[:1])
        if not inputs or what == "any":
            home = "" if module is None else type(module).__module__
            untraced = module is not None and any(True for _ in module.children()) and (
                not home.startswith(("torch.nn", "torch.ao.nn", "bitkernels.nn")))
            return frozenset([UNKNOWN] if untraced else [])
        if what == "keeps" and is_max(node, module):
            return frozenset(s if s == UNKNOWN else replace(s, pooled=True) for s in inputs[0])
        if what == "keeps":
            return inputs[0]
        joined = frozenset().union(*inputs)
        if what == "parts":
            return joined
        constants = [a for a in node.args if isinstance(a, (int, float)) and a < 0]
        if constants or not all(inputs):
            return frozenset()
        if UNKNOWN in joined:
            return frozenset([UNKNOWN])
        if what == "product" and any(not s.gate for s in joined):
            return frozenset(s for s in joined if not s.gate)
        return joined

    def _channels(self, node: fx.Node, module: nn.Module | None) -> int | None:
        inputs = [self.channels[n] for n in self.inputs[node]]
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.out_channels
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return module.num_features
        if not inputs:
            return None
        if module is not None:
            same = kind(node, module) in ("source", "any") or is_pool(node, module) or isinstance(
                module, (nn.Identity, nn.modules.dropout._DropoutNd))
            return inputs[0] if same and not isinstance(module, nn.Linear) else None
        name = name_of(node)
        if name in ("cat", "concat"):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            if dim == 1 and all(c is not None for c in inputs):
                return sum(c for c in inputs if c is not None)
        if name in _SAME_CHANNELS or "pool" in name or "dropout" in name:
            known = {c for c in inputs if c is not None}
            return known.pop() if len(known) == 1 else None
        return None

    def _read(self, node: fx.Node) -> None:
        if not node.users:
            return
        try:
            parameter = self.part.root.get_parameter(str(node.target))
        except AttributeError:
            return
        for module in self.part.root.modules():
            if isinstance(module, LAYERS) and module._parameters.get("weight") is parameter:
                self.result.read.add(module)

    def _back(self, node: fx.Node, norms: bool) -> fx.Node:
        """Back over what only moves or scales values, to what made them."""
        while self.inputs[node] and (
                kind(node, self.modules[node]) == "keeps"
                or norms and is_norm(node, self.modules[node])):
            node = self.inputs[node][0]
        return node

    def _find_shortcut(self, addition: fx.Node) -> None:
        """A 1x1 convolution that brings the input of a residual block to the shape of its output:
        from where the block begins to the addition, and something else is between the two."""
        sides = self.inputs[addition]
        for side, other in zip(sides, reversed(sides), strict=True) if len(sides) == 2 else ():
            node = self._back(side, norms=True)
            conv = self.modules[node]
            if (isinstance(conv, nn.modules.conv._ConvNd) and not conv.transposed
                    and set(conv.kernel_size) == {1} and conv.groups == 1
                    and (set(conv.stride) != {1} or conv.in_channels != conv.out_channels)
                    and self.inputs[node]):
                start = self._back(self.inputs[node][0], norms=False)
                beside = not self.before[other] & self._bit(node)
                if beside and any(
                        self.before[other] & self._bit(n) and self.before[n] & self._bit(start)
                        for n in self.layers):
                    self.result.shortcuts.add(conv)

    def _find_expansion(self, depthwise: fx.Node) -> None:
        """The 1x1 convolution of few channels to more that a depthwise one works on, as in the
        inverted residuals of MobileNetV2."""
        node = depthwise
        while len(self.inputs[node]) == 1:
            node = self.inputs[node][0]
            module = self.modules[node]
            if isinstance(module, LAYERS):
                if is_expansion(module):
                    self.result.expansions.add(module)
                return

    def _bit(self, node: fx.Node) -> int:
        return 1 << (self.before[node].bit_length() - 1)

    def _find_gate(self, product: fx.Node) -> None:
        """Layers between a pooled image and the gate in [0, 1] that multiplies its channels."""
        for side in self.inputs[product]:
            node = self._back(side, norms=False)
            if not is_gate(node, self.modules[node]):
                continue
            layers, pooled, waiting = set(), False, list(self.inputs[node])
            while waiting:
                node = waiting.pop()
                module = self.modules[node]
                if is_pool(node, module):
                    pooled = True
                    continue
                if isinstance(module, LAYERS):
                    layers.add(module)
                if node.op == "placeholder" or len(layers) > 3:
                    layers.clear()
                    break
                waiting += [n for n in self.inputs[node] if n.op != "get_attr"]
            if pooled:
                self.result.gates |= layers

    def _find_ends(self, output: fx.Node) -> None:
        """Layers that depend on no other, and those before the output on which no other depends."""
        def inside(node):
            return [m for m in self.part.module(node).modules() if isinstance(m, LAYERS)]

        bits = {node: self._bit(node) for node in self.layers}
        for node in self.layers:
            others = self.before[node] & ~bits[node]
            if not any(others & bit for bit in bits.values()):
                self.result.first.add(inside(node)[0])
            followed = any(self.before[n] & bits[node] for n in self.layers if n is not node)
            if self.before[output] & bits[node] and not followed:
                self.result.last.add(inside(node)[-1])
