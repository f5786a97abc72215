"""Triton's interpreter without what it does over and over, for TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import types

import pytest
import triton.language as tl
from triton.runtime import interpreter


def patching_once(patch, scopes: dict):
    """In the place of what patches triton.language at every call of a device function."""
    def once(fn):
        modules = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if modules not in scopes:
            scopes[modules] = patch(fn)
            # Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses.
            tl.tensor.__index__ = lambda self: self.handle.data.item()
        return types.SimpleNamespace(restore=lambda: None)

    return once


def by_name(numpy_type):
    """In the place of what makes its whole table of types to look one up."""
    known: dict = {}

    def looked_up(dtype):
        if dtype.name not in known:
            known[dtype.name] = numpy_type(dtype)
        return known[dtype.name]

    return looked_up


def types_once(init):
    """Of blocks: the checks of a shape and its name, in the constructor's place."""
    known: dict = {}

    def __init__(self, element_ty, shape):
        key = element_ty.name, *shape
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    return __init__


def tensors_once(init):
    """What tensors have of their type, in the constructor's place."""
    known: dict = {}

    def __init__(self, handle, type):
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = dict(self.__dict__)
        self.__dict__.update(known[type.name], handle=handle)

    return __init__


@pytest.fixture(scope="module", autouse=True)
def language_patched_once():
    """What is most of the interpreter's time is done once; undone at the end.

    Integers are not added, subtracted and multiplied once more in 64 bits, for an assertion that
    the interpreter drops unless it debugs.
    """
    scopes: dict = {}
    options = interpreter.interpreter_builder.options
    block, tensor = tl.core.block_type, tl.core.tensor
    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patching_once(interpreter._patch_lang, scopes))
        context.setattr(interpreter, "_get_np_dtype", by_name(interpreter._get_np_dtype))
        context.setattr(interpreter.interpreter_builder, "options",
                        dataclasses.replace(options, sanitize_overflow=options.debug))
        context.setattr(block, "__init__", types_once(block.__init__))
        context.setattr(tensor, "__init__", tensors_once(tensor.__init__))
        yield
    for scope in reversed(scopes.values()):
        scope.restore()
