"""Which backend and kernel each layer of a model gets, and why.

The answers come from the code that dispatches the calls (`bitkernels.backends.explain`); which
calls there are is seen where the model makes them. `python -m bitkernels explain` prints the same.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bitkernels import backends
from bitkernels._dispatch import below_autograd
from bitkernels.backends import gpus
from bitkernels.backends.answer import registered
from bitkernels.nn import BinaryResidualBlock
from bitkernels.nn.layer import BinaryLayer
from bitkernels.ops._record import OPERATORS

_NAMESPACE = "bitkernels"
FUSED = "one operator"
_patching = threading.Lock()
_REAL = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Call:
    """A call of an operator: which kernel it gets.

    operator: with its overload, as "packed_conv2d.packed".
    backend: "reference", "cpu", "triton" or "cuda"; "pytorch" of a real layer.
    kernel: "avx512", "avx2", ... of the CPU; an inner product and its tile of Triton, or the
      operator's name; a kernel of csrc/cuda.
    reason: why this one, and why not those that come before it.
    trust: of GPU kernels: "checked", "not checked yet", or what was wrong with others.
    """

    operator: str
    backend: str
    kernel: str
    reason: str
    trust: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer of a model and its calls, in the order they were made.

    name: in the model, "" for the model itself and for an operator alone. kind: its class.
    form: of the weight: "packed", "latent" (signed in each call) or "real"; "" without one.
    note: of a residual block "one operator", or why its layers ran separately; of a binary layer
      that computes on real numbers the reason; of a converted model who runs its graph; of a graph
      what is not listed.
    """

    name: str
    kind: str
    form: str
    note: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` is a table; `to_dict()` is of plain types, for JSON."""

    target: str
    layers: tuple[Layer, ...]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        reasons: dict[str, int] = {}
        rows = [["layer", "kind", "form", "operator", "kernel", "why"]]
        for layer in self.layers:
            fused = layer.note == FUSED
            head = [layer.name, layer.kind + (f", {FUSED}" if fused else ""), layer.form]
            if layer.note and not fused:
                rows.append([*head, layer.note])
                head = ["", "", ""]
            for call in dict.fromkeys(layer.calls):
                times = layer.calls.count(call)
                why = call.reason + (f" ({call.trust})" if call.trust else "")
                rows.append([*head, f"{times} x {call.operator}" if times > 1 else call.operator,
                             f"{call.backend}: {call.kernel}",
                             f"[{reasons.setdefault(why, len(reasons) + 1)}]"])
                head = ["", "", ""]
        # A note is as long as it likes.
        widths = [max(len(row[i]) for row in rows if len(row) == 6 or i < 3) for i in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
                 .rstrip() for row in rows]
        return "\n".join([f"on {self.target}", "", *lines, "",
                          *(f"[{i}] {reason}" for reason, i in reasons.items())])


def explain(model_or_op: Any, *inputs: Any, target: str | None = None, **kw: Any) -> Explanation:
    """Which backend and kernel a call of an operator, or each layer of a model, gets, and why.

        print(bitkernels.explain(model.eval(), images))
        bitkernels.explain("packed_conv2d", words, weight_words, 256, padding=1, target="sm_90")

    model_or_op: a module, or an operator of torch.ops.bitkernels, itself or by name
      ("packed_conv2d.packed" for an overload).
    inputs, kw: its arguments. Tensors may be on the meta device or fake, where nothing is computed.
    target: None: where the tensors are. "cpu", or a GPU's architecture as "sm_90" or "hip": what
      would run there, whether this machine has one or not, if Triton, CuPy and NVRTC are installed.

    A model is called once, as it is (training or evaluation) and with gradients or without as now,
    but as a deep copy: parameters, buffers, running statistics and random generators stay as they
    are. Its forward hooks are called. The calls of a model's forward are listed, not those of its
    backward. Of an operator nothing is computed; one that is made of others shows them.

    Raises TypeError for what is neither module nor operator, ValueError for a target or an operator
    that there is not, for tensors on meta without a target, and for a model that cannot be copied;
    what wrong arguments raise is the operator's own error.
    """
    module = model_or_op if isinstance(model_or_op, nn.Module) else None
    module = getattr(module, "_orig_mod", module)  # a compiled one makes the same calls
    operator = None if module is not None else _operator(model_or_op)
    device, gpu, name = _target(target, module, (inputs, kw))
    with gpus.planning_for(gpu):
        if module is not None:
            return Explanation(name, _of_model(module, inputs, kw, device))
        assert operator is not None
        observer = _Observer(device, computes=False)
        # Where a tensor has an address, its alignment is part of the choice.
        kept = not _is_composed(operator, device)
        inputs, kw = tree_map(lambda t: t if kept and type(t) is Tensor else _without_memory(t),
                              (inputs, kw))
        with observer:
            operator(*inputs, **kw)
        return Explanation(name, (Layer("", _name(operator), "", "", tuple(observer.calls[""])),))


def _operator(given: Any) -> torch._ops.OpOverload:
    if isinstance(given, str):
        name, _, overload = given.removeprefix(f"{_NAMESPACE}::").partition(".")
        packet = getattr(torch.ops.bitkernels, name, None)
        if packet is None or name.startswith("_") or (overload or "default") not in (
                packet.overloads()):
            raise ValueError(f"bitkernels.explain: no operator is called {given!r}; "
                             "bitkernels.ops lists them")
        return getattr(packet, overload or "default")
    if isinstance(given, torch._ops.OpOverloadPacket):
        given = given.default
    if isinstance(given, torch._ops.OpOverload) and given.namespace == _NAMESPACE:
        return given
    raise TypeError("bitkernels.explain takes a module, an operator of torch.ops.bitkernels or its "
                    f"name, got {given if isinstance(given, type) else type(given).__name__}")


def _target(target: str | None, module: nn.Module | None, arguments: Any
            ) -> tuple[str, gpus.Gpu | None, str]:
    """(device type, the GPU that is planned for where it is only named, its name)."""
    if target == "cpu":
        return "cpu", None, "cpu"
    if target is not None:
        try:
            gpu = gpus.named(target)
        except ValueError as error:
            raise ValueError(f"bitkernels.explain: target must be 'cpu' or an architecture; {error}"
                             ) from None
        return "cuda", gpu, f"{gpu.name}, with Triton, CuPy and NVRTC"
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    if module is not None:
        tensors += [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"bitkernels.explain: the first tensor is on {device}, which says nothing "
                         "of where it would run: give target='cpu' or a GPU's, as 'sm_90'")
    if device.type != "cuda":
        return device.type, None, device.type
    there = gpus.of(device)
    assert there is not None
    fake = any(isinstance(t, FakeTensor) for t in tensors)
    return "cuda", there if fake else None, f"{there.name} ({there.architecture})"


def _name(operator: torch._ops.OpOverload) -> str:
    name = operator._schema.name.partition("::")[2]
    return name if operator._overloadname == "default" else f"{name}.{operator._overloadname}"


def _launcher(operator: torch._ops.OpOverload, run: Callable[..., Any]
              ) -> Callable[..., Any] | None:
    """The operator on a backend `run`, its arguments checked; None where there is no such thing."""
    name, _, overload = _name(operator).partition(".")
    record = OPERATORS.get(name)
    return record.launcher(run, overload) if record and record.launched else None


def _is_composed(operator: torch._ops.OpOverload, device: str) -> bool:
    """Whether the operator is made of others there."""
    name = _name(operator)
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return (_launcher(operator, backends.explain) is None
            and not (key is not None and registered(name, key)))


def _without_memory(value: Any) -> Any:
    """A tensor on meta, of the same strides."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta",
                               requires_grad=value.requires_grad)


class _Observer(TorchDispatchMode):
    """Asks about every call of an operator that has kernels, and lets it pass.

    computes: whether in its own memory; else all that is called returns tensors on meta.
    """

    def __init__(self, device: str, computes: bool = True) -> None:
        super().__init__()
        self.device, self.computes, self.scope = device, computes, [""]
        self.calls: dict[str, list[Call]] = {"": []}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else its first use imports the compiler, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != _NAMESPACE or not any(
                isinstance(t, Tensor) for t in tree_leaves((args, kwargs))):
            return self._pass(func, args, kwargs)
        if _is_composed(func, self.device):
            key = torch._C.DispatchKey.CUDA if self.device == "cuda" else torch._C.DispatchKey.CPU
            # Its kernel itself, under this mode, so that the calls which it makes are seen.
            with self, below_autograd():
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        out = self._pass(func, args, kwargs)  # first, for a kernel may fail at its first use
        self._note(func, args, kwargs)
        return out

    def _pass(self, func, args, kwargs):
        if not self.computes:
            args, kwargs = tree_map(_without_memory, (args, kwargs))
        return func(*args, **kwargs)

    def _note(self, operator: torch._ops.OpOverload, args: tuple, kw: dict[str, Any]) -> None:
        answers = []

        def run(op: str, *args, **kw):
            answers.append(backends.explain(op, *args, device=self.device, **kw))
            return None, None

        launcher = _launcher(operator, run) or functools.partial(run, _name(operator))
        launcher(*args, **kw)
        found = answers[0]
        self.calls[self.scope[-1]].append(Call(_name(operator), found.backend, found.kernel or "",
                                               found.reason, found.trust))


@dataclass
class _Seen:
    """A module that was called. unfused: what it said before the call, if it is a block. runs: who
    runs the graph of a converted model on a CPU."""

    module: nn.Module
    unfused: str | None = None
    runs: str = ""


def _of_model(model: nn.Module, inputs: tuple, kw: dict[str, Any], device: str
              ) -> tuple[Layer, ...]:
    from bitkernels.converter import Converted

    try:
        model = copy.deepcopy(model)
    except Exception as error:  # whatever the model's own parts raise
        raise ValueError("bitkernels.explain works on a deep copy, and this "
                         f"{type(model).__name__} has none: {type(error).__name__}: {error}"
                         ) from error
    names = {id(module): name for name, module in model.named_modules()}
    observer = _Observer(device)
    seen: dict[str, _Seen] = {}
    call: Any = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(module))
        if name is None:  # of another thread's model, or made on the way
            return call(module, *args, **kwargs)
        found = seen.setdefault(name, _Seen(module))
        observer.calls.setdefault(name, [])
        if isinstance(module, BinaryResidualBlock) and args:
            found.unfused = module.unfused(args[0])
        if isinstance(module, Converted) and torch.device(observer.device).type == "cpu":
            engine = module.engine(*args, **kwargs)
            found.runs = (f"PyTorch runs its graph, call by call: {engine}"
                          if isinstance(engine, str) else
                          "the C++ engine runs its graph as one call, with the same kernels")
        observer.scope.append(name)
        try:
            return call(module, *args, **kwargs)
        finally:
            observer.scope.pop()

    # Hooks on the modules would change what they do: blocks with hooks run separately.
    with _patching, _generators(model, (inputs, kw)):
        nn.Module.__call__ = called  # type: ignore
        try:
            with observer:
                model(*inputs, **kw)
        finally:
            nn.Module.__call__ = call  # type: ignore
    layers = (_layer(name, found, observer.calls[name]) for name, found in seen.items())
    return tuple(layer for layer in layers if layer is not None)


@contextmanager
def _generators(model: nn.Module, arguments: Any) -> Iterator[None]:
    """Leaves the random generators of torch, Python and NumPy as they were."""
    tensors = (*model.parameters(), *model.buffers(),
               *(t for t in tree_leaves(arguments) if isinstance(t, Tensor)))
    gpus_used = {t.device for t in tensors if t.is_cuda and not isinstance(t, FakeTensor)}
    numpy, state = sys.modules.get("numpy"), random.getstate()
    arrays = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(sorted(gpus_used, key=str)):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(arrays)


def _packed_product(call: Call) -> bool:
    return call.operator.partition(".")[0] in ("packed_conv2d", "packed_linear")


def _layer(name: str, seen: _Seen, calls: list[Call]) -> Layer | None:
    """None for what only calls others."""
    module = seen.module
    kind, form, note = type(module).__name__, "", ""
    if isinstance(module, BinaryResidualBlock):
        form = "packed" if hasattr(module.conv, "weight_words") else "latent"
        note = FUSED if calls else "separate layers: " + (
            seen.unfused or "the shortcut's output is of another type")
    elif hasattr(module, "weight_words"):
        form = "packed"
    elif isinstance(module, BinaryLayer):
        form = "latent" if calls else "real"
        note = "" if calls else module.pack_obstacle() or "computed on real numbers"
    elif isinstance(module, _REAL):
        form = "real"
    elif seen.runs:
        note = seen.runs
    elif not calls:
        return None
    elif isinstance(module, fx.GraphModule):  # of `convert`, for one
        form = "packed" if any(_packed_product(call) for call in calls) else ""
        note = "a graph: its real operators, which are PyTorch's, are not listed"
    if form == "real" and not calls:
        calls = [Call("aten", "pytorch", "the library's", "a layer of real numbers")]
    return Layer(name, kind, form, note, tuple(calls))
