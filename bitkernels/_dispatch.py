"""What the kernels of the Autograd key share: Functions of first order, refusals, autocast.

The differentiable operators are kernels of torch's Autograd key that apply an autograd Function,
which keeps packed bits. Transforms of `torch.func` call such a kernel once for each of their
levels, with that level's tensors, as they do torch's generated kernels; there `record` keeps the
inputs and calls the operator again, for the level below. Functions that modules apply directly have
the form with `setup_context`, and torch handles all levels (`apply`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling

below_autograd = torch._C._AutoDispatchBelowAutograd
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# What a call has on plain CPU tensors, outside of modes, transforms and autocast.
_PLAIN = (_CPU | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)).raw_repr()
functorch_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_OLD_VMAP = torch._C._parse_dispatch_key("VmapMode")


def is_recorded(operator: str, *tensors: Tensor | None) -> bool:
    """Whether a Function must see an operator's inputs: one requires grad, or `torch.func` decides.

    Raises where one has a tangent.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(operator, tensors)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
        return functorch_active()
    return False


def _refuse_tangents(operator: str, values: Iterable[Any]) -> None:
    if any(map(_has_tangent, values)):
        _refuse_forward_mode(operator)


def _refuse_forward_mode(operator: str) -> NoReturn:
    raise RuntimeError(
        f"{operator} has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad); it has "
        "one in reverse mode (vjp, grad, jacrev, backward)")


def _has_tangent(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.dtype.is_floating_point
            and forward_ad.unpack_dual(value).tangent is not None)


def functional_transforms() -> bool:
    """Whether `torch.func` transforms the code that runs, or a level of forward mode is open."""
    return functorch_active() or forward_ad._current_level >= 0


class _NoSecondDerivative(Function):
    """The outputs of a backward, with a backward that says that there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, inputs, *tensors):
        return tuple(t.view_as(t) for t in tensors[inputs:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, ctx.inputs = inputs[0], len(inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name} has no second derivative: trying to differentiate twice")


def _one_by_one(run, level: int, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """A backward of each gradient of a batch, of all levels of batches.

    `is_grads_batched` and `jacobian(vectorize=True)` batch by the vmap that was before
    `torch.func`, for which operators have no rules.
    """
    if level == 0:
        out = run(*grads)
        return out if isinstance(out, tuple) else (out,)
    # A tensor without this level is expanded to the size, which is else not read.
    batches = [None if g is None else torch._remove_batch_dim(g, level, 1, 0) for g in grads]
    size = max((len(b) for b in batches if b is not None), default=1)
    each = [_one_by_one(run, level - 1, tuple(
        None if b is None else b[i if len(b) > 1 else 0] for b in batches)) for i in range(size)]
    return tuple(None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
                 for parts in zip(*each, strict=True))


def _once(name: str, backward, is_operators: bool):
    """torch's `once_differentiable`, with a message that names the operator, and in torch.func.

    backward: of the context, the saved tensors and the gradients. The saved tensors are read here,
    once, where hooks may compute: checkpoints do, and hand out a tensor a single time.
    is_operators: of a Function of an operator, which Dynamo does not read.
    """

    def first_order(ctx, saved, recorded: bool, *grads):
        # The levels of torch.func find their tensors by the keys that are left out elsewhere, and
        # Dynamo does not know such a context.
        if functorch_active() or not is_operators and is_compiling():
            with torch.no_grad():
                outputs = backward(ctx, saved, *grads)
        elif recorded:  # straight below the operators' refusals of gradients
            with torch.no_grad(), below_autograd():
                outputs = backward(ctx, saved, *grads)
        else:  # a context less, of 3 us
            with below_autograd():
                outputs = backward(ctx, saved, *grads)
        if not recorded:
            return outputs
        inputs = [g for g in grads if isinstance(g, Tensor) and (g.requires_grad or _is_wrapped(g))]
        # A gradient penalty reaches the saved tensors where the output's gradient is a constant.
        inputs += [t for t in saved if isinstance(t, Tensor) and t.requires_grad]
        if not inputs:
            return outputs
        results = list(outputs) if isinstance(outputs, tuple) else [outputs]
        at = [i for i, t in enumerate(results) if t is not None]
        linked = _NoSecondDerivative.apply(name, len(inputs), *inputs, *(results[i] for i in at))
        for i, t in zip(at, linked, strict=True):
            results[i] = t
        return tuple(results)

    @functools.wraps(backward)
    def once(ctx, *grads):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, grads)
        saved, recorded = ctx.saved_tensors, torch.is_grad_enabled()
        if not is_compiling() and _is_included(_OLD_VMAP):
            level = torch._C._vmapmode_increment_nesting() - 1
            torch._C._vmapmode_decrement_nesting()
            run = functools.partial(first_order, ctx, saved, recorded)
            return _one_by_one(run, level, grads)
        return first_order(ctx, saved, recorded, *grads)

    return once


class FirstOrder(Function):
    """A Function with a first derivative, and one error for a second.

    `operator` is what errors name. `backward` is a function of the context, the saved tensors,
    which it does not read from the context, and the gradients.
    """

    operator: str

    def __init_subclass__(cls) -> None:
        is_operators = "setup_context" not in vars(cls)  # Dynamo reads the others' backward
        cls.backward = staticmethod(  # type: ignore
            _once(cls.operator, cls.backward, is_operators))


class _Recomputed:
    """The context of a Function whose forward runs once more, for its backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad, self.saved_tensors = needs_input_grad, ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def is_traced() -> bool:
    """Whether a kernel of the Autograd key has to leave its operator whole: a dispatch mode, of
    export for one, sees what the kernel calls."""
    return torch._C._len_torch_dispatch_stack() > 0 and not _is_excluded(_AUTOGRAD)


def unrecorded(function: Any, tensors: tuple[Tensor | None, ...], *rest: Any) -> Any:
    """What a traced kernel returns where no gradient is recorded: its operator, or its ONNX form.

    See `record` for the arguments; `function.onnx` takes the same.
    """
    if torch.onnx.is_in_onnx_export():
        if not hasattr(function, "onnx"):
            _refuse_onnx(function.operator)
        return function.onnx(*tensors, *rest)
    with below_autograd():
        return function.call(*tensors, *rest)


class _OneLevel(Function):
    """An operator on one level of `torch.func`; keeps its inputs, and its Function's forward runs
    in the backward. Of several outputs the first is differentiable."""

    @staticmethod
    def forward(ctx, function, rest, *tensors):
        ctx.function, ctx.rest = function, rest
        ctx.save_for_backward(*tensors)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below_autograd():
            out = function.call(*tensors, *rest)  # which the levels below record
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx, *grads):
        inner = _Recomputed(ctx.needs_input_grad[2:])
        tensors = ctx.saved_tensors
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            ctx.function.forward(inner, *tensors, *ctx.rest)
        return None, None, *ctx.function.backward(inner, *grads)[:len(tensors)]


def record(function: Any, tensors: tuple[Tensor | None, ...], *rest: Any) -> Any:
    """An operator's Function, of the combined form, applied on one level of `torch.func`.

    Its arguments are the tensors and the rest; `function.call` is the operator with the same ones.
    """
    if any(t is not None and t.requires_grad for t in tensors):
        from torch._functorch.utils import enable_single_level_autograd_function

        with enable_single_level_autograd_function():
            return super(Function, _OneLevel).apply(function, rest, *tensors)
    with below_autograd():
        return function.call(*tensors, *rest)


def differentiate(function: Any, tensors: tuple[Tensor | None, ...], *rest: Any) -> Any:
    """What a kernel of the Autograd key returns, of checked arguments.

    The operator's Function where a gradient is recorded, the whole operator where a trace looks on,
    else `function.below`, with the same arguments, whose result is the operator's.
    """
    if is_recorded(function.operator, *tensors):
        if functorch_active():
            return record(function, tensors, *rest)
        return super(Function, function).apply(*tensors, *rest)
    if is_traced():
        return unrecorded(function, tensors, *rest)
    with below_autograd():
        return function.below(*tensors, *rest)


def with_gradient_of(value: Tensor, linear: Tensor) -> Tensor:
    """The value, to the bit, with the gradient of `linear`, which is finite."""
    return value.detach() + (linear - linear.detach())


def apply(function: Any, *args: Any) -> Any:
    """`function.apply`, of the form with `setup_context` and with a name, `operator`.

    `torch.export` and `torch.jit.trace` keep what a forward calls and no backward, so there it is
    `function.exported`: the same values and gradients by PyTorch's own functions
    (`with_gradient_of`).

    Binding the arguments takes `Function.apply` 15 us, which only `torch.func` and Dynamo need.
    Raises where an input has a tangent: Dynamo takes no Function with a `jvp`, to say it there.
    """
    if is_compiling():
        return (function.exported if torch.compiler.is_exporting() else function.apply)(*args)
    if torch.jit.is_tracing():
        return function.exported(*args)
    if forward_ad._current_level >= 0:
        _refuse_tangents(function.operator, args)
    if functorch_active():
        try:
            return function.apply(*args)
        except NotImplementedError as error:  # of a level below, whose tangents are not seen here
            if "jvp" in str(error):
                _refuse_forward_mode(function.operator)
            raise
    return super(Function, function).apply(*args)


def in_memory_format(t: Tensor, format: torch.memory_format) -> Tensor:
    """t.contiguous(memory_format=format); t itself in `torch.func`: vmap has no such formats."""
    return t if _is_wrapped(t) else t.contiguous(memory_format=format)


def _refuse_onnx(operator: str) -> NoReturn:
    raise RuntimeError(f"bitkernels::{operator} has no ONNX form; give torch.onnx.export the model "
                       "itself, not a program that torch.export made of it")


def refuse_none(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, but for None in the place of a tensor: PyTorch takes it for any."""
    required = [(i, a.name) for i, a in enumerate(op._schema.arguments) if str(a.type) == "Tensor"]
    packet = op._schema.name.removeprefix("bitkernels::")

    def call(*args, **kw):
        for i, name in required:
            if (args[i] if i < len(args) else kw.get(name, op)) is None:
                raise RuntimeError(f"bitkernels::{packet}: {name} must be a tensor, got None")
        return kernel(*args, **kw)

    return call


def refuse_grad(op: torch._ops.OpOverload, straight: Callable[..., Any]):
    """A kernel of the Autograd key, with keyset, for an operator that would detach: it refuses.

    straight: of a tensor, what runs calls on its device past the dispatcher, or None.
    """
    packet = op._schema.name.removeprefix("bitkernels::")
    names = [a.name for a in op._schema.arguments]
    redispatch, is_grad_enabled = op._handle.redispatch_boxed, torch.is_grad_enabled
    has_engine = None

    def refuse(value, args, kw):
        arg = next(name for name, v in (*zip(names, args, strict=False), *kw.items()) if v is value)
        raise RuntimeError(
            f"bitkernels::{packet}: {arg} must not require grad, this operator has no "
            "gradient; use binary_conv2d or binary_linear to train, or .detach()")

    def forward(keyset, *args, **kw):
        nonlocal has_engine
        if is_grad_enabled():
            for value in args:
                if isinstance(value, Tensor) and value.requires_grad:
                    refuse(value, args, kw)
            for value in kw.values():
                if isinstance(value, Tensor) and value.requires_grad:
                    refuse(value, args, kw)
        if forward_ad._current_level >= 0:
            for value in (*args, *kw.values()):
                if _has_tangent(value):
                    refuse(value, args, kw)
        if keyset.raw_repr() == _PLAIN:
            if has_engine is None:  # kernels are registered after operators
                has_engine = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
            if has_engine:  # C++, which calls nothing that autograd would record
                return redispatch(_CPU, *args, **kw)
        if is_traced() and torch.onnx.is_in_onnx_export():
            _refuse_onnx(packet)
        launch = straight(args[0])
        if launch is not None:
            return launch(*args, **kw)
        with below_autograd():
            return op(*args, **kw)

    return forward


def autocast(op, device: str):
    """Under autocast the output, not the input, is cast: a cast could round x < 0 up to 0."""

    def forward(*args, dtype=None, **kw):
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
        ):
            if dtype is None and args[0].dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device)
            return op(*args, dtype=dtype, **kw)

    return forward
