"""A converted network in the C++ engine, as one call: the Python side of csrc/bitkernels.h."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import math
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitkernels.backends import cpu
from bitkernels.converter.described import metadata_of

if TYPE_CHECKING:
    from bitkernels.converter.converted import Converted

_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_RANK = 8
_DTYPES = (torch.float32, torch.int32, torch.int64, torch.bool)  # as in bk_dtype
_FORMS = 16  # of inputs, whose descriptions are kept
_NAMES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
          torch.int8: "I8"}


class Refused(Exception):
    """Why the engine does not run a network."""


class _Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("rank", c_int32),
                ("sizes", c_int64 * _MOST_RANK), ("strides", c_int64 * _MOST_RANK)]


class _Step(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("call", c_char_p), ("weight", c_char_p),
                ("seconds", c_double)]


_TENSORS, _INT = POINTER(_Tensor), POINTER(c_int)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "bk_error": (c_char_p, []),
    "bk_load_memory": (c_void_p, [c_char_p, c_size_t]),
    "bk_free": (None, [c_void_p]),
    "bk_output_count": (c_int, [c_void_p]),
    "bk_output": (c_int, [c_void_p, c_int, _TENSORS, _TENSORS]),
    "bk_run": (c_int, [c_void_p, _TENSORS, _TENSORS]),
    "bk_memory": (c_int, [c_void_p, _TENSORS, POINTER(c_int64), POINTER(c_int64)]),
    "bk_step_count": (c_int, [c_void_p, _TENSORS, _INT]),
    "bk_run_timed": (c_int, [c_void_p, _TENSORS, _TENSORS, POINTER(_Step), c_int])}


@functools.cache
def _library() -> Any:
    """The extension, whose C functions need neither Python nor torch. Raises Refused."""
    if cpu.why_not:
        raise Refused(cpu.why_not)
    path = importlib.import_module("bitkernels._C").__file__
    library = ctypes.CDLL(path)  # loaded already: the same one
    for name, (returns, takes) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise Refused("bitkernels._C is older than the Python files") from None
        function.restype, function.argtypes = returns, takes
    return library


@dataclass(frozen=True)
class Step:
    """What the engine did at once: the last node of the graph in it, its operator, the buffer with
    its weight ("" without one), and how long it took."""

    name: str
    operator: str
    weight: str
    seconds: float


@dataclass(frozen=True)
class _Form:
    """Inputs of certain types, sizes and strides, and the outputs of a run with them."""

    inputs: bytes
    outputs: bytes
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]


class Engine:
    """A network of the engine's, which copies its constants.

    Raises Refused with the engine's reason where it does not take the graph or its tensors.
    """

    def __init__(self, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        self._library = _library()
        file = _safetensors(metadata, tensors)
        handle = self._library.bk_load_memory(file, len(file))
        if not handle:
            raise Refused(self._reason())
        self._handle = handle
        self._forms: OrderedDict[Any, _Form] = OrderedDict()
        weakref.finalize(self, self._library.bk_free, handle)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the graph gives for float32 tensors on the CPU of the sizes that it takes."""
        given, outputs, made, _kept = self._arguments(inputs)
        self._check(self._library.bk_run(self._handle, given, outputs))
        return made

    def plan(self, inputs: Sequence[tuple[torch.dtype, Sequence[int]]]) -> None:
        """Goes through the whole graph for inputs of these types and sizes, without values.

        Raises RuntimeError with the reason where it cannot run.
        """
        given = (_Tensor * len(inputs))()
        for described, (dtype, sizes) in zip(given, inputs, strict=True):
            described.dtype, described.rank = _DTYPES.index(dtype), len(sizes)
            described.sizes[:len(sizes)] = sizes
        self._outputs(given)

    def timed(self, inputs: Sequence[Tensor]) -> list[Step]:
        """A run, and how long each of its steps took."""
        given, outputs, *_kept = self._arguments(inputs)
        count = c_int()
        self._check(self._library.bk_step_count(self._handle, given, ctypes.byref(count)))
        steps = (_Step * count.value)()
        self._check(self._library.bk_run_timed(self._handle, given, outputs, steps, count))
        return [Step(s.name.decode(), s.call.decode(), s.weight.decode(), s.seconds) for s in steps]

    def memory(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Bytes of the constants, and of the activations of one run at their peak."""
        given, *_kept = self._arguments(inputs)
        constants, activations = c_int64(), c_int64()
        self._check(self._library.bk_memory(self._handle, given, ctypes.byref(constants),
                                            ctypes.byref(activations)))
        return constants.value, activations.value

    def _arguments(self, inputs: Sequence[Tensor]) -> tuple[Any, Any, list[Tensor], Any]:
        """(inputs and outputs for C, the outputs, the inputs that they point into)."""
        # Strides that are all 0, of one number expanded, would mean a dense tensor.
        inputs = [t if any(t.stride()) else t.contiguous() for t in inputs]
        key = tuple((t.dtype, t.shape, t.stride()) for t in inputs)
        form = self._forms.get(key)
        if form is None:
            form = self._form(inputs)
            self._forms[key] = form
            if len(self._forms) > _FORMS:
                self._forms.popitem(last=False)
        given = (_Tensor * len(inputs)).from_buffer_copy(form.inputs)
        for described, tensor in zip(given, inputs, strict=True):
            described.data = tensor.data_ptr()
        made = [torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")
                for sizes, strides, dtype in form.made]
        outputs = (_Tensor * len(made)).from_buffer_copy(form.outputs)
        for described, tensor in zip(outputs, made, strict=True):
            described.data = tensor.data_ptr()
        return given, outputs, made, inputs

    def _form(self, inputs: Sequence[Tensor]) -> _Form:
        given = (_Tensor * len(inputs))()
        for described, tensor in zip(given, inputs, strict=True):
            described.dtype, described.rank = _DTYPES.index(tensor.dtype), tensor.dim()
            described.sizes[:tensor.dim()] = tensor.shape
            described.strides[:tensor.dim()] = tensor.stride()
        outputs = self._outputs(given)
        return _Form(bytes(given), bytes(outputs), tuple(
            (tuple(d.sizes[:d.rank]), tuple(d.strides[:d.rank]), _DTYPES[d.dtype])
            for d in outputs))

    def _outputs(self, given: Any) -> Any:
        outputs = (_Tensor * self._library.bk_output_count(self._handle))()
        for i, described in enumerate(outputs):
            self._check(self._library.bk_output(self._handle, i, given, ctypes.byref(described)))
        return outputs

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(f"Converted: {self._reason()}")

    def _reason(self) -> str:
        return self._library.bk_error().decode(errors="replace")


class Engines:
    """The engine of a converted network, made at the first run on a CPU and again where a buffer
    was written to since. A copy or a pickle starts without.

    Not for what another part of PyTorch has to see: gradients, autocast, torch.func, subclasses of
    Tensor. Writes that PyTorch does not count are not seen either, see `WeightImage`.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Engine | str, Any] | None = None

    def of(self, network: Converted, inputs: Sequence[Any]) -> Engine | str:
        """The engine for a run with these inputs, or why it cannot be one of the engine's."""
        for value in inputs:
            if type(value) not in _PLAIN or value.layout is not torch.strided or value.is_neg():
                return "an input is no plain dense tensor"
            if not value.is_cpu:
                return f"an input is on {value.device}"
            if value.requires_grad and torch.is_grad_enabled():
                return "an input requires a gradient"
            if value.dim() > _MOST_RANK:
                return f"an input has more than {_MOST_RANK} dimensions"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "it is called inside torch.func"
        return self.current(network)

    def current(self, network: Converted) -> Engine | str:
        """The engine for the buffers as they are, or why there is none."""
        buffers = network.graph_module._buffers
        tensors = [t for name in network.state_names if (t := buffers[name]) is not None]
        state = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        kept = self._kept
        if kept is None or kept[0] != state:
            # Held, so that no id and no address of theirs can be another tensor's next time.
            held = [(t, t.untyped_storage()) for t in tensors]
            network.arrange()
            self._kept = kept = state, self._made(network), held
        return kept[1]

    def _made(self, network: Converted) -> Engine | str:
        tensors = network.graph_module.state_dict()
        for name, tensor in tensors.items():
            if not tensor.is_cpu:
                return f"{name} is on {tensor.device}"
            if type(tensor) not in _PLAIN or tensor.is_inference() or tensor.is_shared():
                return f"{name} may be written to unseen"
        try:
            return Engine(metadata_of(network, trees=False), tensors)
        except (Refused, ValueError) as error:
            return str(error).removeprefix("save_converted: ")

    def __deepcopy__(self, memo: dict[int, Any]) -> Engines:
        return Engines()

    def __reduce__(self) -> Any:
        return Engines, ()


def _safetensors(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """The file of `save_converted`, for the engine, which reads no other form. Made here since the
    package safetensors may be missing, and runs should not depend on it."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin, parts = 0, []
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise Refused(f"{name} is of {tensor.dtype}".replace("torch.", ""))
        size = math.prod(tensor.shape) * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, begin + size]}
        if size:
            dense = tensor.detach().contiguous()
            parts.append(ctypes.string_at(dense.data_ptr(), size))
        begin += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))
