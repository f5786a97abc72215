"""A converted network in one file: safetensors, with the graph as JSON in its metadata.

Metadata, all strings; readers ignore keys that they do not know:
  format          "bitkernels.converted"
  format_version  "1"; a reader refuses a larger one
  bitkernels      the version that wrote the file
  graph           JSON, see described.py
  report          JSON: the fields of ConvertReport
The tensors are the constants, under the names that the graph's nodes read. No code is in the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitkernels._files import replace_file, safetensors_bytes
from bitkernels._packages import needs
from bitkernels.converter.capture import neutral
from bitkernels.converter.converted import Converted
from bitkernels.converter.described import (
    FORMAT,
    VERSION,
    inputs_of_file,
    metadata_of,
    module_of,
    tree_of,
)
from bitkernels.converter.engine import Engine
from bitkernels.converter.inputs import Input
from bitkernels.converter.report import ConvertReport, Product

_VERSIONS = tuple(map(str, range(1, VERSION + 1)))  # that this reader knows


def save_converted(network: Converted, path: str | os.PathLike) -> None:
    """Write a network that `convert` returned: 1 bit a binary weight, and the graph, no pickle.

    `load_converted` gives it back without the model's code. The file is the old one or the new
    one, also after a crash; the same network gives the same bytes.

    Raises ValueError for another module and for a graph with calls that a file cannot hold;
    OSError where the file cannot be written; ImportError without the package safetensors.
    """
    if not isinstance(network, Converted):
        raise ValueError("save_converted: network must be what bitkernels.convert(model) returns, "
                         f"got {type(network).__name__}")
    _safetensors()
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, t in network.graph_module.state_dict().items()}
    from bitkernels import __version__

    metadata = {**metadata_of(network), "bitkernels": __version__,
                "report": json.dumps(asdict(network.report))}
    try:
        replace_file(Path(path), safetensors_bytes(tensors, metadata))
    except OSError as error:
        raise type(error)(error.errno, f"save_converted cannot write: {error.strerror}",
                          os.fspath(path)) from None


def load_converted(path: str | os.PathLike, device: str | torch.device = "cpu") -> Converted:
    """The network of a file that `save_converted` wrote, on a device.

    The whole graph is tried without values first, so a file that is broken, of a later format or
    not of `save_converted` is refused here: ValueError, as is a device that is none or not here.
    FileNotFoundError; ImportError without the package safetensors.
    """
    _safetensors()
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # a torch without CUDA asserts
        raise ValueError(f"load_converted: device must be one of torch, got {device!r}: "
                         f"{(str(error).splitlines() or [''])[0]}") from None
    with neutral(), torch.device("cpu"):  # whatever the caller's default is
        network = _loaded(path, device)
    return network.to(device)


def _loaded(path: str | os.PathLike, device: torch.device) -> Converted:
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
        inputs = inputs_of_file(described)
        module = module_of(described, inputs, tensors, device)
        network = Converted(module, _report(json.loads(metadata["report"])), inputs,
                            tree_of(described["in_spec"]), tree_of(described["out_spec"]))
        if not _planned(network):
            _try_without_values(described, inputs, tensors)
    except Exception as error:  # whatever a strange graph runs into
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"load_converted: {path} is broken: {type(error).__name__}: {reason}"
                         ) from None
    return network


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


def _planned(network: Converted) -> bool:
    """Whether the engine takes the graph for the example's sizes: known in milliseconds, where
    PyTorch first imports its rules for tensors without memory, for seconds."""
    engine = network.engines.current(network)
    if not isinstance(engine, Engine):
        return False
    try:
        engine.plan([(input.dtype, input.example) for input in network.inputs
                     if input.dtype is not None])
    except (RuntimeError, ValueError):
        return False
    return True


def _try_without_values(described: dict[str, Any], inputs: tuple[Input, ...],
                        tensors: dict[str, Tensor]) -> None:
    """Runs the graph on tensors without memory, whatever sizes the file asks for."""
    on = torch.device("meta")
    module = module_of(described, inputs, {key: t.to(on) for key, t in tensors.items()}, on)
    with on, torch.no_grad():
        module(*(torch.empty(input.example, dtype=input.dtype) for input in inputs))


def _report(fields: dict[str, Any]) -> ConvertReport:
    products = tuple(Product(**{**p, "epilogue": tuple(p["epilogue"])})
                     for p in fields.pop("products"))
    pairs: dict[str, Any] = {key: tuple(map(tuple, fields.pop(key))) for key in ("real", "others")}
    return ConvertReport(products, **pairs, **fields)


def _safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ImportError(needs("files of converted networks", "safetensors")) from None

