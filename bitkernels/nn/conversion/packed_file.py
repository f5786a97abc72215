"""A packed model in one file: safetensors, with what the layers are in its metadata.

Metadata beside that of `_tensor_file.py`, with the format "bitkernels.packed":
  layers   JSON: {name: {"class": "PackedConv2d", argument: value, ...}} of packed layers and
           residual blocks
  aliases  JSON: {key: key}, entries of the state_dict that are the same tensor as another
The tensors are those of the model's state_dict, under its keys.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels._tensor_file import Kind
from bitkernels.nn.conversion.checks import check_model
from bitkernels.nn.conversion.pack import pack
from bitkernels.nn.latent import is_sharded
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.packed import _Packed
from bitkernels.nn.residual_block import BinaryResidualBlock
from bitkernels.ops._checks import describe

FORMAT = "bitkernels.packed"
_KIND = Kind("packed models", "save_packed", "load_packed", FORMAT, 1)
LISTED = 12  # differences in a message
_WRITTEN = (_Packed, BinaryResidualBlock)  # what says more than its state


def save_packed(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model that `pack` returned to a safetensors file: 1 bit a binary weight, no pickle.

    What is saved is its state_dict, on any device and of any dtype, and what each packed layer is,
    so that `load_packed` can refuse another model. Buffers that are not persistent are not saved,
    as in any state_dict. The file is the old one or the new one, also after a crash; the same model
    gives the same bytes.

    Raises ValueError for a model without packed layers and for entries of the state_dict that are
    not plain tensors with values; OSError where the file cannot be written; ImportError without
    the package safetensors.
    """
    check_model("save_packed", model)
    _KIND.package()
    model = _uncompiled(model)
    layers = {name: m.arguments() for name, m in model.named_modules() if isinstance(m, _WRITTEN)}
    if not any(isinstance(m, _Packed) for m in model.modules()):
        raise ValueError(f"save_packed: {type(model).__name__} has no packed layer; give it what "
                         "bitkernels.nn.pack(model) returns")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[Any, str] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or (
                is_sharded(value)):
            what = f"a {type(value).__name__}" if not isinstance(value, Tensor) else (
                "on the meta device" if value.is_meta else
                "sharded" if is_sharded(value) else f"of layout {value.layout}")
            raise ValueError(f"save_packed: {key} is {what}; only tensors with values are saved")
        place = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in places:
            aliases[key] = places[place]
        else:
            places[place] = key
            tensors[key] = value
    _KIND.write(path, tensors, {"layers": json.dumps(layers), "aliases": json.dumps(aliases)})


def load_packed(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """The packed model of a file that `save_packed` wrote.

    model: the architecture, freshly built and binarized as the saved one was before `pack`, on any
      device, the meta device too; or a packed one. Its weights do not matter. It is not changed,
      whatever happens.

    Modules that were other ones in an earlier version bring what such a file has of them up to
    date in `read_earlier_packed(name, layers, state)`, where they have that method.

    Returns a copy of the model with the file's packed layers and all its values, in eval mode and
    without gradients, as `pack` does.

    Raises ValueError, with a list of all differences, for a file of another model (layers of other
    classes or arguments, missing and unknown tensors, other shapes and dtypes), for a file that is
    broken, no file of `save_packed` or of a later format; FileNotFoundError; ImportError without
    the package safetensors.
    """
    check_model("load_packed", model)
    layers, state = _read(path)
    model = _uncompiled(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if callable(update := getattr(module, "read_earlier_packed", None)):
            try:
                update(name, layers, state)
            except (KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"load_packed: what {path} has of {name} is broken: {error}"
                                 ) from None
    found = []
    for name, theirs in layers.items():
        module = modules.get(name)
        if not isinstance(module, (BinaryLayer, *_WRITTEN)):
            found.append(f"{name} is {_a(theirs['class'])} in the file, "
                         + (_a(type(module).__name__) if module is not None else "not there")
                         + " in the model")
    found += [f"{name} is {_a(type(m).__name__)} in the model, not packed in the file"
              for name, m in modules.items() if isinstance(m, _WRITTEN) and name not in layers]
    _refuse(path, model, found)
    packed = (copy.deepcopy(model) if any(isinstance(m, _Packed) for m in modules.values())
              else pack(model, filter=lambda name, _: name in layers))
    ours = {name: _plain(m.arguments()) for name, m in packed.named_modules()
            if isinstance(m, _WRITTEN)}
    for name, theirs in layers.items():
        mine = ours.get(name, {})
        found += [f"{name}: {key}={theirs.get(key)!r} in the file, {mine.get(key)!r} in the model"
                  for key in dict.fromkeys([*theirs, *mine]) if theirs.get(key) != mine.get(key)]
    target = packed.state_dict(keep_vars=True)
    found += [f"missing in the file: {key}" for key in target if key not in state]
    found += [f"not in the model: {key}" for key in state if key not in target]
    for key, tensor in target.items():
        if key in state and isinstance(tensor, Tensor):
            there, here = describe(state[key]), describe(tensor)
            if there != here:
                found.append(f"{key} is {there} in the file, {here} in the model")
    found += _torn(target, state)
    _refuse(path, model, found)
    on_meta = any(t.is_meta for t in target.values())
    if on_meta:
        state = {key: value.clone() if target[key].is_meta else value.to(target[key].device)
                 for key, value in state.items()}
    try:
        packed.load_state_dict(state, assign=on_meta)
    except RuntimeError as error:
        raise ValueError(f"load_packed: {path} is broken: {error}") from None
    left = [name for name, t in packed.named_buffers() if t.is_meta]
    if left:
        raise ValueError(f"load_packed: {', '.join(left)} of {type(model).__name__} are on the "
                         "meta device and not in a state_dict: build the model on a real device")
    return packed.eval().requires_grad_(False)


def _read(path: str | os.PathLike) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Layers and tensors, aliases resolved."""
    metadata, state = _KIND.read(path)
    try:
        layers, aliases = (dict(json.loads(metadata[key])) for key in ("layers", "aliases"))
        state |= {key: state[kept] for key, kept in aliases.items()}
        for theirs in layers.values():
            str(theirs["class"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"load_packed: the metadata of {path} is broken") from None
    return layers, state


def _torn(target: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Keys that are one tensor in the model and have several values in the file."""
    first: dict[int, str] = {}
    found = []
    for key, tensor in target.items():
        kept = first.setdefault(id(tensor), key)
        if kept != key and kept in state and key in state and describe(state[kept]) == describe(
                state[key]) and not torch.equal(state[kept], state[key]):
            found.append(f"{kept} and {key} are one tensor in the model, two in the file")
    return found


def _refuse(path: str | os.PathLike, model: nn.Module, found: list[str]) -> None:
    if found:
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise ValueError(f"load_packed: {path} is not of this {type(model).__name__}: "
                         + "; ".join(found[:LISTED]) + more)


def _a(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """As they are after a journey through JSON, where tuples are lists."""
    return json.loads(json.dumps(arguments))


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile(model) returned."""
    return model._modules.get("_orig_mod") or model
