"""One record an operator, and all that is made of it.

A file of this folder declares an operator by `define(Operator(...))`; `bitkernels.ops` imports
every file, so there is no list. From the records come the schemas, the kernels of every dispatch
key that Python registers (fake, autograd or its refusal, autocast, vmap, reference, GPU), the check
of GPU kernels at first use, the tests' samples and wrong arguments, `bitkernels.ops.NAME` with its
help, and docs/operators.md.

Three forms of one operator:

  arguments   those of the schema, as a caller gives them
  call        what `check` makes of them: what every kernel gets, GPU kernels and reference alike
  outputs     what `fake` allocates for a call, in the strides that every kernel's outputs have
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bitkernels._dispatch import autocast, functorch_active, refuse_grad, refuse_none
from bitkernels.ops._batching import Rule, batched, each, images, per_sample, rows
from bitkernels.ops._samples import Sample, Values, channels_last

# What the files of operators need, in one import.
__all__ = ["Call", "Operator", "Sample", "channels_last", "define", "each", "images", "per_sample",
           "rows"]
LIB = torch.library.Library("bitkernels", "DEF")
KEY = "CompositeExplicitAutograd"  # every device without a kernel of its own
# Of operators that have these overloads: whether kernels are asked for (real, packed) outputs.
OUTPUTS = {"": (True, False), "packed": (False, True), "both": (True, True)}
# The page's sections.
GROUPS = ("Training", "Bits", "Products of bits", "Real layers in int8", "The residual block")


class Call(NamedTuple):
    """What kernels get: positional and keyword arguments."""

    args: tuple
    kw: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator, declared.

    schemas: of each overload, the default one first. A size is SymInt. Overloads .packed and .both
        mean that kernels take `real` and `packed` and return both outputs, None where not asked.
    group: the section of docs/operators.md, one of `GROUPS`.
    text: the help: description, Arguments, Returns, Errors, Example (`ops/__init__.py` reads it).
    check: arguments to `Call`. Raises RuntimeError by `_checks.fail`.
    fake: a call to empty outputs.
    reference: a call to outputs in plain PyTorch, of any strides: the specification.
    composed: a call to outputs by other operators. It runs in place of the reference.
    autograd: arguments to outputs, differentiable: the kernel of the Autograd key, and where
        neither of the two before is given, of all devices. None: the operator refuses gradients.
    batched: the rule of `torch.vmap`, from `_batching.py`.
    samples: calls by which the operator is tested, and its kernels are checked at first use.
    engine: whether csrc/ has a kernel of it.
    product: whether its Triton kernel has several inner products.
    """

    schemas: tuple[str, ...]
    group: str
    text: str
    check: Callable[..., Call]
    fake: Callable[..., Any]
    batched: Rule
    samples: Callable[[Values], list[Sample]]
    reference: Any = None
    composed: Any = None
    autograd: Any = None
    engine: bool = True
    product: bool = False

    @property
    def name(self) -> str:
        return self.schemas[0].partition("(")[0]

    @property
    def file(self) -> str:
        """Of the record; the operator's file in every backend has the same name."""
        return self.fake.__module__.rpartition(".")[2]

    @property
    def launched(self) -> bool:
        """Whether backends have kernels of it: the reference where nothing faster is."""
        return self.reference is not None and self.composed is None

    @property
    def overloads(self) -> dict[str, torch._ops.OpOverload]:
        """By name, "" for the default one."""
        packet = getattr(torch.ops.bitkernels, self.name)
        names = [schema.partition("(")[0].partition(".")[2] for schema in self.schemas]
        return {name: getattr(packet, name or "default") for name in names}

    def launcher(self, run: Callable[..., Any], overload: str = "") -> Callable[..., Any]:
        """An overload on a backend: its arguments checked, then `run(name, *args, **kw)`."""
        name, check = self.name, refuse_none(self.overloads[overload], self.check)
        if not any(".both(" in schema for schema in self.schemas):
            def launch(*args, **kw):
                call = check(*args, **kw)
                return run(name, *call.args, **call.kw)

            return launch
        real, packed = OUTPUTS[overload]

        def launch_product(*args, **kw):
            call = check(*args, **kw)
            outputs = run(name, *call.args, real=real, packed=packed, **call.kw)
            return outputs if real and packed else outputs[0] if real else outputs[1]

        return launch_product

    def cases(self) -> list[Call]:
        """The samples that kernels are checked by, as calls, without gradients."""
        found = []
        for sample in self.samples(Values()):
            if sample.kernel is not None:
                args, kw = self.check(*map(_detached, sample.args), **{
                    name: _detached(value) for name, value in sample.kw.items()})
                if sample.overload:
                    kw = dict(zip(("real", "packed"), OUTPUTS[sample.overload], strict=True), **kw)
                found.append(Call(args, {**kw, **sample.kernel}))
        return found


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


OPERATORS: dict[str, Operator] = {}
# Of a name and an overload: the operator, its number of positional arguments, the others' names.
_SIGNATURES: dict[tuple[str, str], tuple[torch._ops.OpOverload, int, list[str]]] = {}
# By type of device: what runs the calls of operators that operators make (`inside`). Of devices
# whose host is slower than they are; the C++ engine checks and unpacks its arguments itself.
STRAIGHT: dict[str, Callable[..., Any]] = {}


# By what `inside` returns: `remembered` of a backend that can repeat what it has launched.
REMEMBERED: dict[Callable[..., Any], Callable[..., Any]] = {}


def remembered(run: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """`function(run, *args)`, which allocates, calls operators by `run` and looks at parts of
    tensors, and does nothing else. A backend may repeat its launches for calls that look alike.

    function: of the module. args: tensors, the first not None, and what can be hashed.
    """
    again = REMEMBERED.get(run)
    return function(run, *args) if again is None else again(run, function, *args)


def inside(like: torch.Tensor) -> Callable[..., Any]:
    """By what the kernel of an operator calls others, below autograd: a function of a name and a
    call, in the form that `check` makes of arguments, which nobody checks again.

    like: a tensor on the device. It is the backend itself, past PyTorch's dispatcher, which takes
    as long as the launch; but the dispatcher where modes, transforms or a profiler look on.
    """
    straight = STRAIGHT.get(like.device.type)
    if (straight is None or torch._C._len_torch_dispatch_stack() > 0 or functorch_active()
            or type(like) not in (torch.Tensor, torch.nn.Parameter)
            or torch.autograd._profiler_enabled()):
        return dispatched
    return straight


def traced(run: Callable[..., Any]) -> bool:
    """Whether a mode sees what `run`, of `inside`, calls: that of a compiler, which moves calls
    between forward and backward, for one."""
    return run is dispatched and torch._C._len_torch_dispatch_stack() > 0


def dispatched(name: str, *args: Any, **kw: Any) -> Any:
    """A call, whose values are in the schema's order, by PyTorch's dispatcher; what the schema does
    not have, as which outputs are wanted, is left out."""
    if not kw:
        op, positional, names = _SIGNATURES[name, ""]
        return op(*args[:positional], **dict(zip(names, args[positional:], strict=False)))
    which = kw.get("real", True), kw.get("packed", False)
    overload = next(name for name, outputs in OUTPUTS.items() if outputs == which)
    op, positional, names = _SIGNATURES[name, overload]
    given = dict(zip(names, args[positional:], strict=False))
    found = op(*args[:positional], **given, **{n: v for n, v in kw.items() if n in names})
    if "real" not in kw or all(which):
        return found
    return (found, None) if which[0] else (None, found)


def define(operator: Operator) -> None:
    """Makes the operator known to torch, but for its kernels in `bitkernels.backends`."""
    OPERATORS[operator.name] = operator
    for schema in operator.schemas:
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for overload, op in operator.overloads.items():
        name = f"{operator.name}.{overload}".rstrip(".")
        named = [a.name for a in op._schema.arguments if a.kwarg_only]
        _SIGNATURES[operator.name, overload] = op, len(op._schema.arguments) - len(named), named
        torch.library.register_fake(f"bitkernels::{name}", _fake(operator, overload), lib=LIB)
        LIB.impl(name, batched(op, operator.batched), "FuncTorchBatched")
        if operator.autograd is not None:
            LIB.impl(name, refuse_none(op, operator.autograd), "Autograd")
        else:
            LIB.impl(name, refuse_grad(op, _straight(operator, overload)), "Autograd",
                     with_keyset=True)
        if operator.composed is not None:
            LIB.impl(name, _composed(operator), KEY)
        elif not operator.launched:
            assert operator.autograd is not None, f"{name} computes nothing"
            # Below autograd (inference mode) the same function finds no gradient to record.
            LIB.impl(name, refuse_none(op, operator.autograd), KEY)
        if operator.autograd and any(a.name == "dtype" for a in op._schema.arguments):
            for device in ("cpu", "cuda"):
                LIB.impl(name, autocast(op, device), f"Autocast{device.upper()}")


def _fake(operator: Operator, overload: str) -> Callable[..., Any]:
    return operator.launcher(lambda _, *args, **kw: operator.fake(*args, **kw), overload)


def _straight(operator: Operator, overload: str) -> Callable[[Any], Callable[..., Any] | None]:
    """Of a tensor: what checks and runs arguments on its device past the dispatcher, or None."""
    launchers: dict[Callable[..., Any], Callable[..., Any]] = {}

    def straight(like: Any) -> Callable[..., Any] | None:
        if not operator.launched or not isinstance(like, torch.Tensor):
            return None
        run = inside(like)
        if run is dispatched:
            return None
        if run not in launchers:
            launchers[run] = operator.launcher(run, overload)
        return launchers[run]

    return straight


def _composed(operator: Operator) -> Callable[..., Any]:
    return operator.launcher(lambda _, *args, **kw: operator.composed(*args, **kw))


def register(key: str, run: Callable[..., Any], names: tuple[str, ...] | None = None) -> None:
    """Makes `run(name, *args, **kw)` the kernel, under a dispatch key, of the operators that are
    launched: of all, or of those in `names`."""
    for name, operator in OPERATORS.items():
        if operator.launched and (names is None or name in names):
            for overload in operator.overloads:
                LIB.impl(f"{name}.{overload}".rstrip("."), operator.launcher(run, overload), key)
