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

from bitkernels.nn.conversion.graph import LAYERS

_HARMLESS = ("dtype", "device", "shape", "size", "dim", "numel", "ndim", "requires_grad")


def read_by_source(module: nn.Module) -> set[nn.Module]:
    """Layers below the module whose weight its forward, or a method that this calls, reads."""
    found: set[nn.Module] = set()
    cls: Any = type(module)
    for path in _paths(cls):
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layer, LAYERS):
            found.add(layer)
    return found


@functools.cache
def _paths(cls: Any) -> frozenset[str]:
    """a.0.b for each self.a[0].b.weight in the methods."""
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
    while waiting:
        name = waiting.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        nodes = [n for n in ast.walk(methods[name]) if isinstance(n, ast.Attribute)]
        harmless = {id(n.value) for n in nodes if n.attr in _HARMLESS}
        for node in nodes:
            owner = ast.unparse(node.value)
            if owner == "self":
                waiting.append(node.attr)
            elif node.attr == "weight" and owner.startswith("self.") and id(node) not in harmless:
                paths.add(re.sub(r"\[(\d+)\]", r".\1", owner.removeprefix("self.")))
    return frozenset(paths)
