"""Weights of Larq Zoo: HDF5 files that Keras' `save_weights` or `save` (format "h5") has written.

Layers of the file and of the network are walked together, in the order of Keras' `model.layers`;
names of layers, whose counters depend on what else the writing process had built, are not looked
at. Kernels may be latent or -1 and +1: the network's layers take the sign themselves, with a factor
computed from what the file holds, as Larq's quantizers do.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from bitkernels._packages import needs
from bitkernels.models.weights.checkpoint import enter

SHOWN = 8  # differences that an error lists

# What a file calls the tensors of a layer of each kind, and what its module calls them.
TENSORS = {
    "conv": {"kernel": "weight", "bias": "bias"},
    "depthwise": {"depthwise_kernel": "weight", "bias": "bias"},
    "blur": {"depthwise_kernel": "blur"},
    "dense": {"kernel": "weight", "bias": "bias"},
    "norm": {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
             "moving_variance": "running_var"},
    "prelu": {"alpha": "weight"},
}


def load(model: nn.Module, path: str | PathLike[str], head: bool = True) -> None:
    """Load a Larq Zoo file into a network that has `keras_layers`: all of it or nothing.

    path: an HDF5 file of `save_weights`, or of `save` with format "h5".
    head: False leaves the network's last layers (`keras_head` of them, else the last one) as they
      are. The file may then lack them, as the files "..._notop.h5" do, or have them for other
      classes.

    Raises ValueError, naming the differences, for a file that is not one of this network, that is
    truncated or has other numbers than reals, for a network that is packed or of a class that Larq
    Zoo does not have, and for one on the meta device of which something would stay there;
    ImportError without h5py.
    """
    layers = _layers_of(model)
    try:
        import h5py
    except ImportError as error:
        raise ImportError(needs("Keras files", "h5py", error)) from error
    try:
        with h5py.File(path, "r") as file:
            state = _matched(model, layers, list(_groups(file, str(path))), str(path), head)
    except FileNotFoundError:
        raise
    except Exception as error:  # what h5py raises depends on where the file is broken
        if str(error).startswith("load_weights: "):
            raise
        raise ValueError(f"load_weights: {path} is not an HDF5 file, or a damaged one: "
                         f"{error}") from error
    # Keras does not count the batches that a norm has seen.
    rest = {key: torch.zeros((), dtype=value.dtype) if value.is_meta else value
            for key, value in model.state_dict().items()
            if key.endswith("num_batches_tracked") or not value.is_meta}
    enter(model, rest | state, strict=head)


def _layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    name = type(model).__name__
    if not hasattr(model, "keras_layers"):
        raise ValueError(f"load_weights: Larq Zoo, whose files are HDF5, has no {name}")
    network: Any = model
    layers = network.keras_layers()
    for _, layer in layers:
        if type(layer).__name__.startswith("Packed"):
            raise ValueError(f"load_weights: {name} is packed: load its weights first, then pack")
    return layers


def _groups(file: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The file's layers that have weights: name, and dataset of each of them."""
    import h5py

    root = file
    if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
        if "model_weights" not in root:
            raise ValueError(f"load_weights: {path} is an HDF5 file, but not one of Keras' "
                             "save_weights: it has no attribute layer_names")
        root = _inside(root, "model_weights")
    for name in _names(root, "layer_names"):
        group = _inside(root, name)
        tensors: dict[str, Any] = {}
        for weight in _names(group, "weight_names"):
            kind = re.sub(r"(_\d+)?(:\d+)?$", "", weight.rsplit("/", 1)[-1])
            if kind in tensors:
                raise ValueError(f"load_weights: layer {name} of {path} has two tensors {kind}")
            tensors[kind] = _inside(group, weight)
            if not isinstance(tensors[kind], h5py.Dataset):
                raise ValueError(f"load_weights: {weight} in {path} is no tensor")
        if tensors:
            yield name, tensors


def _names(group: Any, attribute: str) -> list[str]:
    """A list of names, which Keras cuts into attribute0, attribute1, ... where it is long."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        parts, i = [], 0
        while f"{attribute}{i}" in group.attrs:
            parts.append(group.attrs[f"{attribute}{i}"])
            i += 1
        if not parts:
            raise KeyError(f"{group.name} has no attribute {attribute}")
    return [name.decode() if isinstance(name, bytes) else str(name)
            for part in parts for name in part]


def _inside(group: Any, name: str) -> Any:
    """An object of the file itself: a link or a dataset that reads another file is refused."""
    import h5py

    here = group
    for part in name.split("/"):
        if not isinstance(here, h5py.Group):
            raise KeyError(f"{name}: {here.name} is no group")
        if isinstance(here.get(part, getlink=True), h5py.ExternalLink):
            raise ValueError(f"load_weights: {name} in {group.file.filename} is a link to another "
                             "file")
        here = here[part]
    if isinstance(here, h5py.Dataset) and (here.external or here.is_virtual):
        raise ValueError(f"load_weights: {name} in {group.file.filename} is stored in another file")
    return here


def _matched(model: nn.Module, layers: list[tuple[str, nn.Module]],
             groups: list[tuple[str, dict[str, Any]]], path: str, head: bool) -> dict[str, Tensor]:
    """The state_dict entries that the file holds; ValueError where it is not this network's."""
    body = len(layers) - getattr(model, "keras_head", 1)
    names = {id(module): name for name, module in model.named_modules()}
    counts = (len(layers),) if head else (len(layers), body)
    differences = [] if len(groups) in counts else [
        f"{len(groups)} layers with weights in the file, {len(layers)} in the network"]
    if not head:
        layers, groups = layers[:body], groups[:body]
    # A grouped convolution is listed once for each of its groups, which are layers of the file.
    listed = Counter(id(module) for _, module in layers)
    state: dict[str, Tensor] = {}
    for (kind, module), (group, tensors) in zip(layers, groups, strict=False):
        differences += _entries(kind, module, listed[id(module)], names[id(module)], group,
                                tensors, state)
    if head and len(groups) == body and len(differences) == 1:
        raise ValueError(f"load_weights: {path} has no head (\"notop\"), which this "
                         f"{type(model).__name__} has: load it with head=False, which leaves the "
                         "network's own")
    if differences:
        more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        raise ValueError(f"load_weights: {path} does not hold the weights of this "
                         f"{type(model).__name__}; network against file: "
                         + "; ".join(differences[:SHOWN] + more))
    return state


def _entries(kind: str, module: nn.Module, parts: int, own_name: str, group: str,
             tensors: dict[str, Any], state: dict[str, Tensor]) -> list[str]:
    """Adds a layer's entries to the state; the differences, where it is another layer.

    parts: layers of the file that the module's output channels are in, one after the other.
    """
    own, where = _own_tensors(kind, module), f"{own_name} ({kind}) and the file's {group}"
    if tensors.keys() != own.keys():
        return [f"{where}: {', '.join(sorted(own))} against {', '.join(sorted(tensors))}"]
    differences = []
    for name, (key, target) in own.items():
        target = target.chunk(parts)[0]
        data, expected = tensors[name], _keras_shape(kind, name, target)
        # Keras has the slopes of a PReLU as (1, 1, C).
        shape = data.shape[-1:] if kind == "prelu" and data.shape[:-1] == (1, 1) else data.shape
        if shape != expected:
            differences.append(f"{where}: {name} {expected} against {data.shape}")
        elif data.dtype.kind != "f":
            differences.append(f"{where}: {name} holds {data.dtype}, not reals")
        else:
            value = _from_keras(kind, name, torch.from_numpy(data[()].astype("float32")), target)
            blur: Any = module
            if not (kind == "blur" and torch.equal(value, blur.binomial().float().cpu())):
                key = f"{own_name}.{key}"
                state[key] = torch.cat((state[key], value)) if key in state else value
    return differences


def _own_tensors(kind: str, module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """What the file must hold for a module: its name there, and the key and tensor here."""
    found = {}
    for name, key in TENSORS[kind].items():
        tensor = module._parameters.get(key, module._buffers.get(key))
        if tensor is not None:
            found[name] = key, tensor
    return found


def _keras_shape(kind: str, name: str, target: Tensor) -> tuple[int, ...]:
    """The shape that Keras gives the tensor."""
    shape = tuple(target.shape)
    if name == "depthwise_kernel":
        return (*shape[2:], shape[0], 1)
    if name == "kernel":
        if kind == "conv":  # a linear layer here may be a 1x1 convolution there
            shape += (1,) * (4 - len(shape))
        return (*shape[2:], shape[1], shape[0])
    return shape


def _from_keras(kind: str, name: str, value: Tensor, target: Tensor) -> Tensor:
    """Axes in PyTorch's order: (H, W, I, O) to (O, I, H, W), (H, W, C, 1) to (C, 1, H, W)."""
    if name == "depthwise_kernel":
        value = value.permute(2, 3, 0, 1)
    elif name == "kernel" and kind == "conv":
        value = value.permute(3, 2, 0, 1)
    elif name == "kernel":
        value = value.t()
    assert value.numel() == math.prod(target.shape)
    return value.reshape(target.shape).contiguous()
