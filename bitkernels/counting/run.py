"""A run of a copy of the model on tensors without values, in which every operator is counted."""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitkernels._arguments import integer
from bitkernels.converter import Converted
from bitkernels.counting.layers import WHOLE, Weights, bits_of, layer_bits
from bitkernels.counting.operators import macs, multiplies_perhaps, of_signs
from bitkernels.counting.result import Layer, Summary
from bitkernels.nn.conversion.checks import check_model
from bitkernels.nn.packed import _Packed

Size = Sequence[int] | Tensor | tuple[Tensor, ...]

_LOOKS = (DataDependentOutputException, DynamicOutputShapeException)
_LEARNED, _FIXED = True, False  # marks of tensors, see _Counter


class _Input(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def summary(model: nn.Module, input_size: Size, *, depth: int | None = None) -> Summary:
    """What each layer of a model weighs and multiplies, and the totals as the papers count them.

        print(bitkernels.summary(model, (3, 224, 224)))
        bitkernels.summary(model, (1, 3, 224, 224)).reactnet.ops

    model: any module: real, with latent binary weights, or packed. It is not changed and not run: a
      copy of it runs in evaluation on tensors that have a shape and no values, without the hooks.
    input_size: the shape of the input with its batch; one of three numbers is a single image, and 1
      goes before it. Or the input itself where it is not one tensor of reals: a tensor, or a tuple
      of those that forward takes. Multiply-adds are those of the whole batch.
    depth: join what lies deeper than so many names; None shows every layer.

    Every product of an input with weights is counted, in layers and in functions that a forward
    calls; products of two inputs, as in attention, are too, apart. A shared module counts once with
    its weights and at each call with its products. An operator that may multiply weights and is not
    known makes its layer's products None, shown as "?", and is named in `uncounted`.

    Raises TypeError for what is no module, a scripted or a converted one, ValueError for a size or
    a depth that is none and for lazy layers without shapes, RuntimeError where the model does not
    take such an input or looks at values.
    """
    check_model("summary", model)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    depth = None if depth is None else integer("summary", "depth", depth)
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)),
                    None)
    if scripted is not None:
        raise TypeError(f"summary: {scripted or 'the model'} is a ScriptModule, which shows no "
                        "layers; give the module that it was made of")
    converted = next((n for n, m in model.named_modules() if isinstance(m, Converted)), None)
    if converted is not None:
        raise TypeError(f"summary: {converted or 'the model'} is a converted network, a graph "
                        "without layers; its report says what it is made of, or give the model "
                        "that was converted")
    inputs = _inputs(model, input_size)
    weights, rows = Weights(), {}
    with _plainly(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        twin = _copy(model, mode)
        counter = _Counter(twin)
        try:
            counter.run(twin, inputs)
        except RuntimeError as error:
            if len(inputs) == 1 and not isinstance(input_size, Tensor) and len(input_size) == 3:
                raise RuntimeError(f"{error}; three numbers are one image, with 1 before them: "
                                   "give an input of three dimensions as a tensor") from error
            raise
    originals = dict(model.named_modules())
    order = [name for name in counter.called if name in originals]
    order += [name for name in counter.names.values() if name not in counter.called]
    for name in order:
        module = originals[name]
        row = _row(name, module, weights.of(module), counter)
        if row is not None:
            rows[name] = row
    return Summary(type(model).__name__, tuple(x.shape for x in inputs),
                   _joined(rows, counter, originals, depth), weights.parameters, weights.values,
                   {name: tuple(sorted(ops)) for name, ops in counter.unknown.items()})


def _inputs(model: nn.Module, given: Size) -> tuple[_Input, ...]:
    if isinstance(given, Tensor):
        given = (given,)
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"summary: input_size must be a shape or tensors, got {given!r}")
    tensors = [x for x in given if isinstance(x, Tensor)]
    if len(tensors) == len(given):
        return tuple(_Input(tuple(x.shape), x.dtype, x.device) for x in tensors)
    if not all(type(n) is int and n >= 1 for n in given):
        shown = ", ".join(repr(n) if isinstance(n, (int, float, str)) else type(n).__name__
                          for n in given)
        raise ValueError("summary: input_size must be a shape of integers of at least 1, or "
                         f"tensors alone, got ({shown})")
    shape: Any = (1, *given) if len(given) == 3 else tuple(given)
    state = [*model.parameters(), *model.buffers()]
    dtype = next((t.dtype for t in state if t.is_floating_point()), torch.float32)
    return (_Input(shape, dtype, state[0].device if state else torch.device("cpu")),)


def _copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """With tensors of `mode` in place of the model's, in evaluation, without its hooks."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if "hooks" in name and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):
                memo[id(value)] = mode.from_tensor(value)
        packed = isinstance(module, _Packed)
        for tensors, taint in ((module._parameters, _LEARNED),
                               (module._buffers, _LEARNED if packed else _FIXED)):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = mode.from_tensor(tensor)
                    _mark(memo[id(tensor)], taint)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        # In evaluation attention is one operator for all its products; in training it is its parts.
        module.training = isinstance(module, nn.MultiheadAttention)
    return twin


class _Counter(TorchDispatchMode):
    """Counts what the modules of a copy call.

    A tensor is marked by what it is made of: of weights (`_LEARNED`), of constants (`_FIXED`), or,
    without a mark, of the input. Only products with something of the input are counted, since
    all others could be taken once for all.
    """

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, str] = {}  # of the layers that may have a row
        self.called: dict[str, int] = {}
        self.inputs: dict[str, int] = {}  # bits
        self.outputs: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.macs: dict[str, Counter[int]] = {}
        self.fixed: dict[str, Counter[int]] = {}  # of them without a learned weight
        self.unknown: dict[str, set[str]] = {}
        self._stack: list[nn.Module] = []
        inside: set[int] = set()
        for name, module in twin.named_modules():
            if id(module) in inside:
                continue
            self.names[id(module)] = name
            if isinstance(module, WHOLE):
                inside |= {id(part) for part in module.modules()} - {id(module)}
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[id(module)]
        self._stack.append(module)
        self.called[name] = self.called.get(name, 0) + 1
        first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        if first is not None:
            self.inputs[name] = (layer_bits(module)[0] if isinstance(module, WHOLE)
                                 else bits_of(first))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._stack and self._stack.pop() is not module:
            pass  # those inside that raised an error which this one caught
        self.outputs[self.names[id(module)]] = tuple(
            tuple(x.shape) for x in tree_leaves(output) if isinstance(x, Tensor))

    def run(self, twin: nn.Module, inputs: tuple[_Input, ...]) -> None:
        given = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        where = type(twin).__name__
        try:
            with self:
                twin(*given)
        except Exception as error:
            if self._stack:
                where += f" in {self.names[id(self._stack[-1])] or 'its forward'}"
            shapes = ", ".join(str(x.shape) for x in inputs)
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, _LOOKS):
                why = f"it looks at values, which shapes do not have ({why})"
            raise RuntimeError(f"summary: {where} does not run on an input of shape {shapes}: "
                               f"{why}") from error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made_of = [_made_of(x) for x in operands]
        if None not in made_of:
            _mark(out, any(made_of))
            return out
        if func._schema.is_mutable:  # what was written to is of the input now
            _mark(out, None)
        self._count(func, args, kwargs, out, operands, made_of)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, operands: list[Tensor],
               made_of: list[Any]) -> None:
        if not self._stack:
            return
        layer = self._stack[-1]
        name = self.names[id(layer)]
        products = macs(func, args, kwargs, out)
        learned = any(kind for kind in made_of)
        if products is None:
            matrices = [kind and sum(n > 1 for n in x.shape) > 1
                        for x, kind in zip(operands, made_of, strict=True)]
            if any(matrices) and multiplies_perhaps(func):
                self.unknown.setdefault(name, set()).add(str(func.overloadpacket))
            return
        if isinstance(layer, WHOLE):
            bits = max(layer_bits(layer))
        else:
            bits = 1 if of_signs(func) else max(map(bits_of, operands))
        self.macs.setdefault(name, Counter())[bits] += products
        if not learned and not of_signs(func):
            self.fixed.setdefault(name, Counter())[bits] += products


def _mark(out: Any, taint: bool | None) -> None:
    for x in tree_leaves(out):
        if isinstance(x, FakeTensor):
            x._made_of = taint  # type: ignore[attr-defined]


def _made_of(tensor: Any) -> bool | None:
    """None: of the input. A tensor from outside, which has no values in this run, is a constant."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "_made_of", None)
    return _LEARNED if isinstance(tensor, nn.Parameter) else _FIXED


@contextmanager
def _plainly() -> Iterator[None]:
    """Nothing compiled, no gradients, attention by matrix products, torch's random state kept."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch_says = logging.getLogger(FakeTensorMode.__module__)  # of errors that are raised too
        stack.callback(setattr, torch_says, "disabled", torch_says.disabled)
        torch_says.disabled = True
        yield


def _row(name: str, module: nn.Module, weights: dict[int, int], counter: _Counter) -> Layer | None:
    leaf = isinstance(module, WHOLE) or not any(True for _ in module.children())
    if not (weights or name in counter.macs or name in counter.unknown
            or (leaf and name in counter.called)):
        return None
    return Layer(name, type(module).__name__, counter.called.get(name, 0), counter.inputs.get(name),
                 counter.outputs.get(name, ()), weights,
                 None if name in counter.unknown else dict(counter.macs.get(name, {})),
                 dict(counter.fixed.get(name, {})))


def _joined(rows: dict[str, Layer], counter: _Counter, modules: dict[str, nn.Module],
            depth: int | None) -> tuple[Layer, ...]:
    if depth is None:
        return tuple(rows.values())
    groups: dict[str, list[Layer]] = {}
    for name, row in rows.items():
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(row)
    found = []
    for name, group in groups.items():
        if len(group) == 1 and group[0].name == name:
            found.append(group[0])
            continue
        weights, products, fixed = Counter[int](), Counter[int](), Counter[int]()
        for row in group:
            weights.update(row.weights)
            products.update(row.macs or {})
            fixed.update(row.fixed_macs)
        unknown = any(row.macs is None for row in group)
        found.append(Layer(name, type(modules[name]).__name__, counter.called.get(name, 0),
                           counter.inputs.get(name), counter.outputs.get(name, ()), dict(weights),
                           None if unknown else dict(products), dict(fixed)))
    return tuple(found)
