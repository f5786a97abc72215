"""Binary weights to one optimizer, the rest to another, behind one `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from bitkernels._arguments import module, number, refuse
from bitkernels.nn import BinaryLayer
from bitkernels.nn.latent import latent_parameters, local
from bitkernels.optim.bop import Bop, Bop2ndOrder
from bitkernels.quantizers import MagnitudeAwareSign, Quantizer, is_binary

__all__ = ["CaseOptimizer", "binary_weights", "clip_latent_weights", "is_binary_weight"]

NamedParameters = list[tuple[str, nn.Parameter]]
Predicate = Callable[[str, nn.Parameter], bool]
Factory = Callable[[NamedParameters], Optimizer]


def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    """The layers of `bitkernels.nn` whose weights are 1 bit each, by name."""
    module("binary_weights", "model", model)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)
            and (is_binary(layer.weight_quantizer)
                 or isinstance(layer.weight_quantizer, MagnitudeAwareSign))}


def binary_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a model's binary layers, by their name in `model.named_parameters()`.

    Binary are the weights of layers of `bitkernels.nn` whose weight quantizer returns -1 and +1, or
    these times a scale; what the inputs are does not matter. A weight that several layers share
    appears once. Of a pruned, normed or parametrized weight it is the parameter that carries the
    signs: `weight_orig`, `weight_v`, `parametrizations.weight.original`.

    Raises ValueError for a layer whose weight is computed from parameters of other shapes.
    """
    ids = set()
    for name, layer in binary_layers(model).items():
        latent = latent_parameters(layer)
        if not latent:
            raise ValueError(f"{name or type(layer).__name__}: no parameter has the shape of its "
                             "weight, which is computed from others; choose the parameters by name")
        ids |= {id(p) for p in latent}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


def is_binary_weight(model: nn.Module) -> Predicate:
    """The predicate that is true for the `binary_weights` of a model, for `CaseOptimizer`.

    Raises ValueError if the model has none, and as `binary_weights` does.
    """
    weights = binary_weights(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no binary weights: no layer of bitkernels.nn "
                         "with a binary weight quantizer")
    ids = {id(p) for p in weights.values()}
    return lambda _name, parameter: id(parameter) in ids


class CaseOptimizer(Optimizer):
    """Several optimizers behind the face of one, each with the parameters that a predicate claims.

        optimizer = CaseOptimizer(
            model, (is_binary_weight(model), lambda params: Bop(params, gamma=1e-4)),
            default=lambda params: torch.optim.Adam(params, lr=1e-2))

    model: a module, or the (name, parameter) pairs themselves.
    cases: pairs of a predicate, called with (name, parameter), and a factory that makes an
      optimizer of a list of (name, parameter), which all optimizers of torch take. The order of
      parameters is the model's.
    default: a factory for the parameters that no predicate claims. Without one these are not
      trained, and a warning lists those that require grad.

    `optimizers` are the optimizers made, the default one last. `param_groups` are all their groups,
    the same dicts, so a scheduler drives either this optimizer or one of `optimizers`. `state` is
    joined from theirs on each access. state_dict has torch's format with the names in the groups.
    A closure runs once, before the first of them steps. Groups are added to the optimizers
    themselves.

    Raises ValueError for a parameter that several predicates claim, a predicate that claims none,
    a factory that leaves out or adds parameters, an optimizer that cannot step without a closure
    (LBFGS), and Bop on weights of a layer of the model whose
    weight quantizer passes no gradient at -1 and +1, or a reversed one; TypeError for a factory
    that makes no optimizer. As `larq.optimizers.CaseOptimizer`, where the predicates see variables.
    """

    optimizers: tuple[Optimizer, ...]

    def __init__(self, model: nn.Module | Iterable[tuple[str, nn.Parameter]],
                 *cases: tuple[Predicate, Factory], default: Factory | None = None) -> None:
        named = _named(model)
        for i, case in enumerate(cases):
            if not isinstance(case, (tuple, list)) or len(case) != 2 or not callable(case[0]):
                refuse("CaseOptimizer", f"case {i}", "a pair of a predicate and a factory", case)
        claimed: list[NamedParameters] = [[] for _ in cases]
        rest: NamedParameters = []
        for name, parameter in named:
            claims = [i for i, (predicate, _) in enumerate(cases) if predicate(name, parameter)]
            if len(claims) > 1:
                raise ValueError(f"parameter {name!r} is claimed by the predicates of cases "
                                 f"{' and '.join(map(str, claims))}; at most one may claim it")
            (claimed[claims[0]] if claims else rest).append((name, parameter))
        for i, parameters in enumerate(claimed):
            if not parameters:
                raise ValueError(f"the predicate of case {i} claims no parameter")
        optimizers = [_made(f"case {i}", factory, parameters)
                      for i, ((_, factory), parameters) in enumerate(zip(cases, claimed,
                                                                         strict=True))]
        if rest and default is not None:
            optimizers.append(_made("the default", default, rest))
        elif untrained := [name for name, p in rest if p.requires_grad]:
            warnings.warn("no predicate claims these parameters and there is no default optimizer, "
                          f"so they are not trained: {', '.join(untrained)}", stacklevel=2)
        if not optimizers:
            raise ValueError("CaseOptimizer: there are no parameters to optimize")
        if isinstance(model, nn.Module):
            for optimizer in optimizers:
                if isinstance(optimizer, (Bop, Bop2ndOrder)):
                    check_slopes(optimizer, model)
        # Makes the tables of hooks; groups and state are the optimizers' own.
        self.__setstate__({"optimizers": tuple(optimizers), "defaults": {}})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, if there is one, then the step of each optimizer; return its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: a group is added to one of `optimizers`."""
        raise RuntimeError("CaseOptimizer: add the group to one of its .optimizers")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises ValueError, before anything is loaded, if the groups differ in number or in their
        parameters' names.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups, saved = self.param_groups, state_dict["param_groups"]
        if len(groups) != len(saved):
            raise ValueError(f"the state has {len(saved)} parameter groups, this optimizer "
                             f"{len(groups)}")
        for i, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
            names, found = ours.get("param_names"), theirs.get("param_names")
            if names is not None and found is not None and names != found:
                missing, extra = set(names) - set(found), set(found) - set(names)
                raise ValueError(
                    f"parameter group {i} is another one in the state: "
                    + (f"missing {sorted(missing)}, unknown {sorted(extra)}" if missing or extra
                       else "the order of its parameters differs"))
            if len(ours["params"]) != len(theirs["params"]):
                raise ValueError(f"parameter group {i} has {len(theirs['params'])} parameters in "
                                 f"the state, {len(ours['params'])} here")
        start = 0
        for optimizer in self.optimizers:
            part = saved[start : start + len(optimizer.param_groups)]
            start += len(part)
            indices = {index for group in part for index in group["params"]}
            optimizer.load_state_dict({
                "param_groups": part,
                "state": {k: v for k, v in state_dict["state"].items() if k in indices}})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _made(what: str, factory: Factory, parameters: NamedParameters) -> Optimizer:
    if isinstance(factory, Optimizer) or not callable(factory):
        raise TypeError(f"{what}: give a function that makes the optimizer of a list of "
                        f"parameters, not {type(factory).__name__}")
    optimizer = factory(list(parameters))
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{what}: the function returned {type(optimizer).__name__}, not a "
                        "torch.optim.Optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{what}: a step of {type(optimizer).__name__} evaluates the closure "
                         "itself, and the one of CaseOptimizer runs once, before all of them; give "
                         f"{type(optimizer).__name__} a step of its own")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for _, p in parameters}:
        left = [name for name, p in parameters if id(p) not in held]
        raise ValueError(f"{what}: {type(optimizer).__name__} does not have the parameters it was "
                         f"given" + (f", it lacks {', '.join(left)}" if left else ""))
    return optimizer


def check_slopes(optimizer: Optimizer, model: nn.Module) -> None:
    """ValueError for weights of -1 and +1 that would never flip, or flip against their gradient."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in binary_layers(model).items():
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, Quantizer) or not any(
                id(p) in held for p in latent_parameters(layer)):
            continue
        with torch.enable_grad():
            ends = torch.tensor([-1.0, 1.0], requires_grad=True)
            (slope,) = torch.autograd.grad(quantizer(ends).sum(), ends)
        if float(slope.min()) <= 0:
            raise ValueError(
                f"{type(optimizer).__name__} cannot train the weight of {name or 'the model'}: "
                f"weight_quantizer={quantizer!r} has the slope {float(slope.min()):.3g} at -1 and "
                "+1, where it keeps weights, so they would never flip the right way; give the "
                "layer NoOp(precision=1), None or 'ste_sign'")


def _named(model: Any) -> NamedParameters:
    """The parameters of a module, or what are pairs of a name and a parameter already."""
    if isinstance(model, nn.Module):
        return list(model.named_parameters())
    named: list[Any] = list(model) if isinstance(model, Iterable) and not isinstance(
        model, (str, Tensor)) else [None]
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
               and isinstance(pair[1], Tensor) for pair in named):
        refuse("CaseOptimizer", "model", "a module or its (name, parameter) pairs", model)
    return named


def clip_latent_weights(optimizer: Optimizer, model: nn.Module,
                        clip: float = 1.0) -> RemovableHandle:
    """Clamp the binary weights of a model to [-clip, clip] after each step of an optimizer.

    For latent weights: beyond the straight-through estimator's clip they get no gradient and would
    never come back. Larq's `weight_clip` constraint (1.25 in QuickNet, with SteSign(1.25)). Only
    weights that the optimizer holds are clamped. Returns the hook's handle, whose remove() ends it.

    Raises ValueError for a clip that is not positive, and if the optimizer holds none of the
    model's binary weights.
    """
    clip = number("clip_latent_weights", "clip", clip, above=0, finite=False)
    if not isinstance(optimizer, Optimizer):
        refuse("clip_latent_weights", "optimizer", "one of torch.optim", optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    weights: list[Tensor] = [p for p in binary_weights(model).values() if id(p) in held]
    if not weights:
        raise ValueError(f"clip_latent_weights: {type(optimizer).__name__} holds none of the "
                         f"binary weights of {type(model).__name__}")

    @torch.no_grad()
    def clamp(*_: Any) -> None:
        shards = [local(weight) for weight in weights]
        torch._foreach_clamp_max_(shards, clip)
        torch._foreach_clamp_min_(shards, -clip)

    return optimizer.register_step_post_hook(clamp)
