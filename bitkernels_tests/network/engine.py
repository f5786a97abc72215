"""The engine for whole networks by its C interface, and graphs for it that are made here."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bitkernels
from bitkernels.backends import cpu
from bitkernels.converter.described import inputs_of_file, module_of
from bitkernels.converter.engine import _Step as StepOf
from bitkernels.converter.engine import _Tensor as TensorOf

safetensors = pytest.importorskip("safetensors.torch")

TYPES = (torch.float32, torch.int32, torch.int64, torch.bool)


def _library() -> ctypes.CDLL:
    if cpu.why_not:  # loading the extension would register its kernels
        pytest.skip(cpu.why_not, allow_module_level=True)
    library = ctypes.CDLL(os.path.join(os.path.dirname(bitkernels.__file__), "_C.abi3.so"))
    for name in ("bk_error", "bk_version", "bk_kernel", "bk_input_name"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("bk_load", "bk_load_memory"):
        getattr(library, name).restype = ctypes.c_void_p
    library.bk_bytes.restype = ctypes.c_int64
    return library


library = _library()


class EngineError(RuntimeError):
    pass


def _try(code: int) -> None:
    if code:
        raise EngineError(library.bk_error().decode())


def described(t: Tensor) -> TensorOf:
    found = TensorOf(t.data_ptr(), TYPES.index(t.dtype), t.dim())
    found.sizes[:t.dim()], found.strides[:t.dim()] = list(t.shape), list(t.stride())
    return found


class Engine:
    """A loaded network."""

    def __init__(self, source: str | os.PathLike | bytes) -> None:
        if isinstance(source, bytes):
            handle = library.bk_load_memory(source, ctypes.c_size_t(len(source)))
        else:
            handle = library.bk_load(os.fspath(source).encode())
        if not handle:
            raise EngineError(library.bk_error().decode())
        self.handle = ctypes.c_void_p(handle)

    def __del__(self) -> None:
        library.bk_free(getattr(self, "handle", None))

    def prepared(self, *inputs: Tensor) -> tuple[Any, Any, list[Tensor]]:
        """Inputs and outputs for a run, and the tensors that the outputs are."""
        given = (TensorOf * max(len(inputs), 1))(*map(described, inputs))
        count = library.bk_output_count(self.handle)
        outputs, tensors = (TensorOf * count)(), []
        for i in range(count):
            _try(library.bk_output(self.handle, i, given, ctypes.byref(outputs[i])))
            sizes, strides = outputs[i].sizes[:outputs[i].rank], outputs[i].strides
            tensors.append(torch.empty_strided(sizes, strides[:len(sizes)],
                                               dtype=TYPES[outputs[i].dtype]))
            outputs[i].data = tensors[-1].data_ptr()
        return given, outputs, tensors

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        given, outputs, tensors = self.prepared(*inputs)
        _try(library.bk_run(self.handle, given, outputs))
        return tensors

    def steps(self, *inputs: Tensor) -> list[tuple[str, str, str, float]]:
        """(name, call, weight, seconds) of each step of a timed run."""
        given, outputs, _ = self.prepared(*inputs)
        count = ctypes.c_int()
        _try(library.bk_step_count(self.handle, given, ctypes.byref(count)))
        steps = (StepOf * count.value)()
        _try(library.bk_run_timed(self.handle, given, outputs, steps, count))
        return [(s.name.decode(), s.call.decode(), s.weight.decode(), s.seconds) for s in steps]

    def memory(self, *inputs: Tensor) -> tuple[int, int]:
        constants, activations = ctypes.c_int64(), ctypes.c_int64()
        _try(library.bk_memory(self.handle, (TensorOf * len(inputs))(*map(described, inputs)),
                               ctypes.byref(constants), ctypes.byref(activations)))
        return constants.value, activations.value


class Graph:
    """A graph in the making, as a file holds it; arguments that are nodes are `Node`s."""

    class Node(dict):
        pass

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.nodes: list[Any] = []
        self.tensors: dict[str, Tensor] = {}
        self.output: Any = None
        self.values: list[Tensor] = []  # examples of the inputs

    def input(self, example: Tensor, free: Sequence[int] = (0,)) -> Node:
        name = f"input_{len(self.inputs)}"
        sizes = [f"s{d}" if d in free else n for d, n in enumerate(example.shape)]
        self.inputs.append([name, {"dtype": str(example.dtype).removeprefix("torch.")}, sizes,
                            list(example.shape)])
        self.values.append(example)
        return self.Node(node=name)

    def constant(self, tensor: Tensor) -> Node:
        key = f"constant_{len(self.tensors)}"
        self.tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
        self.nodes.append([key + "_1", "constant", [key], {}])
        return self.Node(node=key + "_1")

    def call(self, target: str, *args: Any, **kwargs: Any) -> Node:
        """Tensors among the arguments become constants."""
        args, kwargs = ([self._plain(v) for v in args],
                        {k: self._plain(v) for k, v in kwargs.items()})  # type: ignore
        name = f"node_{len(self.nodes)}"
        self.nodes.append([name, target, args, kwargs])
        return self.Node(node=name)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.constant(value)
        if isinstance(value, list):
            return [self._plain(v) for v in value]
        return value

    def file(self, *outputs: Node, **metadata: str) -> bytes:
        self.output = list(outputs)
        described = dict(inputs=self.inputs, nodes=self.nodes, output=self.output)
        return safetensors.save(self.tensors, metadata={
            "format": "bitkernels.converted", "format_version": "1", "bitkernels": "0",
            "graph": json.dumps(described)} | metadata)

    def expected(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """What PyTorch computes."""
        described = json.loads(json.dumps(dict(inputs=self.inputs, nodes=self.nodes,
                                               output=self.output)))
        module = module_of(described, inputs_of_file(described), self.tensors, torch.device("cpu"))
        with torch.no_grad():
            return list(module(*inputs))

    def check(self, *outputs: Node, inputs: Sequence[Tensor] | None = None) -> Engine:
        """Both give the same: integers and bits exactly, reals within float32 rounding."""
        engine = Engine(self.file(*outputs))
        inputs = self.values if inputs is None else inputs
        for got, expected in zip(engine(*inputs), self.expected(inputs), strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            if not expected.is_floating_point():
                assert torch.equal(got, expected)
                continue
            finite = expected[expected.isfinite()].abs()
            most = float(finite.max()) if finite.numel() else 1.0
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * most, equal_nan=True)
        return engine
