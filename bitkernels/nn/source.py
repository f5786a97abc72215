"""Which weights the code of a module reads itself, by the text of its methods.

A graph shows the branch that was taken; the text shows the others, and code that no graph shows.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import Any

from torch import nn

_HARMLESS = ("dtype", "device", "shape", "size", "dim", "numel", "ndim", "requires_grad")


def read_by_source(module: nn.Module, layers: tuple[type[nn.Module], ...]) -> set[nn.Module]:
    """Layers, of these classes, below the module whose weight its forward, or a method that this
    calls, reads."""
    found: set[nn.Module] = set()
    cls: Any = type(module)
    paths, by_name, called = _reads(cls)
    if by_name:  # `for layer in self.layers: f(x, layer.weight)`, `w = layer.weight`
        for name, child in module.named_children():
            lists = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            held = list(child.children()) if lists else [child]
            if name not in called:
                found |= {layer for layer in held if isinstance(layer, layers)}
    for path in paths:
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layer, layers):
            found.add(layer)
    return found


def reads_alone(cls: Any, name: str) -> bool:
    """Whether forward, or a method that it calls, reads self.name.weight and none calls self.name.
    """
    paths, _, called = _reads(cls)
    return name in paths and name not in called


@functools.cache
def _reads(cls: Any) -> tuple[frozenset[str], bool, frozenset[str]]:
    """(a.0.b for each self.a[0].b.weight in the methods, whether they also read the weight of
    something else, the names of what they call as self.name(...))."""
    methods: dict[str, ast.AST] = {}
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, node)
    waiting = ["forward"]
    seen: set[str] = set()
    paths: set[str] = set()
    called: set[str] = set()
    by_name = False
    while waiting:
        name = waiting.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        nodes = [n for n in ast.walk(methods[name]) if isinstance(n, ast.Attribute)]
        harmless = {id(n.value) for n in nodes if n.attr in _HARMLESS}
        harmless |= {id(n.args[0]) for n in ast.walk(methods[name]) if isinstance(n, ast.Call)
                     and ast.unparse(n.func) == "isinstance"}
        for node in nodes:
            owner = ast.unparse(node.value)
            if owner == "self":
                waiting.append(node.attr)
                by_name |= node.attr == "get_parameter"
            elif node.attr == "weight" and id(node) not in harmless:
                path = re.sub(r"\[(\d+)\]", r".\1", owner.removeprefix("self."))
                if owner.startswith("self.") and re.fullmatch(r"[\w.]+", path):
                    paths.add(path)
                else:
                    by_name = True
        called |= {node.func.attr for node in ast.walk(methods[name])
                   if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                   and ast.unparse(node.func.value) == "self"}
    return frozenset(paths), by_name, frozenset(called)
