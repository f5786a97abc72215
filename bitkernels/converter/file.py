"""A converted network in one file: safetensors, with the graph as JSON in its metadata.

Metadata beside that of `_tensor_file.py`, with the format "bitkernels.converted":
  graph   JSON, see described.py
  report  JSON: the fields of ConvertReport
The tensors are the constants, under the names that the graph's nodes read. No code is in the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bitkernels._tensor_file import Kind
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

_KIND = Kind("converted networks", "save_converted", "load_converted", FORMAT, VERSION)


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
    _KIND.write(path, network.graph_module.state_dict(), {
        **metadata_of(network), "report": json.dumps(asdict(network.report))})


def load_converted(path: str | os.PathLike, device: str | torch.device = "cpu") -> Converted:
    """The network of a file that `save_converted` wrote, on a device.

    The whole graph is tried without values first, so a file that is broken, of a later format or
    not of `save_converted` is refused here: ValueError, as is a device that is none or not here.
    FileNotFoundError; ImportError without the package safetensors.
    """
    _KIND.package()
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
    metadata, tensors = _KIND.read(path)
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
