"""Bop and Bop2ndOrder: optimizers that flip binary weights and keep no latent ones.

Sources: Helwegen et al., "Latent Weights Do Not Exist: Rethinking Binarized Neural Network
Optimization", NeurIPS 2019 (arXiv 1906.02107), algorithm 2, and Larq's `optimizers.Bop`;
Suarez-Ramirez et al., "A Bop and Beyond: A Second Order Optimizer for Binarized Neural Networks",
CVPRW 2021 (arXiv 2104.05124), and its published code.

Both rules form a test value t for each weight w from running means of its gradient and compare the
product w t with a threshold tau. As Larq writes it,

    w <- sign(-sgn(w t - tau) w),    sign(0) = +1, sgn(0) = 0

so a weight flips where w t > tau, keeps its sign where w t < tau, and **is +1 where w t == tau**,
whatever it was (with tau = 0, a weight whose gradient was 0 so far becomes +1). NaN counts as
equality: it leaves +1, as in every sign of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from bitkernels._arguments import flag, number, refuse
from bitkernels.nn.latent import local

__all__ = ["Bop", "Bop2ndOrder"]

EPSILON = 1e-10  # of Bop2ndOrder's published code
_ABSENT = ("maximize", "weight_decay", "fused", "capturable", "differentiable")


class _FlipOptimizer(Optimizer):
    """What the two share: groups, moments, the flip; a subclass gives the test values."""

    _moments: tuple[str, ...]  # state of each weight: float32, or float64 for float64 weights

    def __init__(self, params: ParamsT, gamma: float | None, lr: float | None, default: float,
                 foreach: bool | None, **hyperparameters: float | bool) -> None:
        if not isinstance(params, Iterable):
            refuse(type(self).__name__, "params", "parameters or groups of them", params)
        if gamma is not None and lr is not None:
            raise ValueError(f"{type(self).__name__}: gamma={gamma!r} and lr={lr!r} are the same "
                             "hyperparameter; give one")
        rate = gamma if gamma is not None else lr if lr is not None else default
        super().__init__(params, dict(lr=rate, **hyperparameters, foreach=foreach))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, a dict with "params" and options; "gamma" is stored under "lr".

        Raises ValueError for a hyperparameter out of range, a group with both "gamma" and "lr", an
        option of torch's optimizers that these do not have, and a parameter that is not real.
        """
        name, group = type(self).__name__, dict(param_group)
        if "gamma" in group:
            if "lr" in group:
                raise ValueError(f"{name}: a group has both gamma and lr, which are the same")
            group["lr"] = group.pop("gamma")
        if absent := [f"{key}={group[key]!r}" for key in _ABSENT if group.get(key)]:
            raise ValueError(f"{name}: a group has {', '.join(absent)}, which {name} does not have")
        for key in ("lr", "sigma", "threshold"):
            if key not in self.defaults:
                continue
            value = group.get(key, self.defaults[key])
            if isinstance(value, Tensor) and not value.dim():  # as torch's optimizers take rates
                value = value.item()
            number(name, "gamma" if key == "lr" else key, value, 0,
                   float("inf") if key == "threshold" else 1, finite=key != "threshold")
        for key in ("foreach", "unbiased"):
            value = group.get(key, self.defaults.get(key))
            if key in self.defaults and (value is not None or key != "foreach"):
                flag(name, key, value)
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
            for param in group["params"]:
                param = param[1] if isinstance(param, tuple) else param
                if isinstance(param, Tensor) and not param.is_floating_point():
                    raise ValueError(f"{name}: binary weights are real, got a parameter of "
                                     f"{param.dtype}")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the moments and the weights that have a gradient; return the closure's loss.

        Raises RuntimeError for a sparse gradient and for "gamma" in a group, which is under "lr".
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "gamma" in group:
                raise RuntimeError(f"{type(self).__name__}: gamma is group['lr'], so that torch's "
                                   "schedulers drive it; set that instead of group['gamma'], and "
                                   "give lr= instead of gamma= to an optimizer around this one")
            params = [p for p in group["params"] if p.grad is not None]
            if float(group["lr"]) == 0:
                # torch.distributed.checkpoint makes an optimizer's state by such a step, which
                # leaves the weights of every optimizer of torch as they are.
                params, new = [p for p in params if self.state[p]], [
                    p for p in params if not self.state[p]]
                self._gradients_and_moments(new)
            if not params:
                continue
            grads, moments = self._gradients_and_moments(params)
            # Elementwise: each process updates its shards, which are all of an undistributed one.
            params, grads = [local(p) for p in params], [local(g) for g in grads]
            moments = [[local(m) for m in kind] for kind in moments]
            foreach = group["foreach"]
            if foreach is None:
                foreach = all(p.is_cuda for p in params)
            if foreach:
                self._update(group, params, grads, moments)
                continue
            for i, param in enumerate(params):
                self._update(group, [param], [grads[i]], [m[i : i + 1] for m in moments])
        return loss

    def _gradients_and_moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """The gradients in the moments' dtype, and for each moment its list of tensors."""
        grads = []
        for param in params:
            grad: Any = param.grad
            if grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            dtype = _moment_dtype(param)
            state = self.state[param]
            for key in self._moments:
                if key not in state:
                    state[key] = torch.zeros_like(param, dtype=dtype)
            grads.append(grad.to(dtype))
        return grads, [[self.state[p][key] for p in params] for key in self._moments]

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor],
                moments: list[list[Tensor]]) -> None:
        tests = self._tests(group, grads, *moments)
        if tests is not None:
            _flip(params, tests, float(group["threshold"]))

    def _tests(self, group: dict[str, Any], grads: list[Tensor],
               *moments: list[Tensor]) -> list[Tensor] | None:
        """Update the moments and return the test values t, or None to leave the weights."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`; the moments of float16 and bfloat16 stay float32.

        Raises ValueError for the state of another optimizer.
        """
        for group in state_dict["param_groups"]:
            if missing := sorted(set(self.defaults) - set(group) - {"differentiable"}):
                raise ValueError(f"not a state of {type(self).__name__}: its groups have no "
                                 + ", ".join(missing))
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                dtype = _moment_dtype(param)
                if key in self._moments and dtype != param.dtype:
                    self.state[param][key] = value.to(param.device, dtype, copy=True)


def _moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _flip(params: list[Tensor], tests: list[Tensor], threshold: float) -> None:
    """w <- sign(-sgn(w t - tau) w), in place."""
    values = torch._foreach_mul(tests, params)
    torch._foreach_sub_(values, threshold)
    torch._foreach_sign_(values)
    torch._foreach_mul_(values, params)
    torch._foreach_sign_(values)
    torch._foreach_neg_(values)
    torch._foreach_add_(values, 0.5)  # -1, 0, +1 to -0.5, 0.5, 1.5: 0 is +1
    torch._foreach_sign_(values)
    torch._foreach_copy_(params, values)


class Bop(_FlipOptimizer):
    """Binary optimizer: flips a weight when the running mean of its gradient says so.

        m <- m + gamma (g - m)
        flip w where w m > threshold

    with m = 0 at first, no bias correction and no reset after a flip; g is the gradient with
    respect to the binary weight. Where w m == threshold, w becomes +1, as in Larq's code.

    params: weights of any shape and real dtype, named or not, or groups with their own gamma and
      threshold. The first step sets real weights to -1 and +1, with the real w in the test;
      layers of `bitkernels.nn` compute with signs before that too. A first step with gamma = 0,
      by which `torch.distributed.checkpoint` makes the state, leaves the weights as they are.
    gamma: the adaptivity rate in [0, 1]; None: 1e-4, Larq's default. It is the group's "lr", which
      all schedulers of `torch.optim.lr_scheduler` drive. Threshold: see `ScheduledHyperparameter`.
    threshold: at least 0.
    lr: gamma by the name that it has in the groups, for code that knows only that name, as
      `ZeroRedundancyOptimizer(params, Bop, lr=1e-4)`.
    foreach: all weights of a group in each call; None does so on CUDA.

    The layers' weight quantizer must pass gradients at |w| = 1: "ste_sign" or NoOp(precision=1) do,
    "approx_sign" does not (its gradient is 0 there: such weights never flip), nor does "swish_sign"
    (below 0: they flip the wrong way). `CaseOptimizer` refuses both.

    state_dict: momentum, one tensor for each weight, float32 (float64 for float64). Sources:
    NeurIPS 2019, algorithm 2; `larq.optimizers.Bop`. Raises ValueError for a gamma or threshold out
    of range, for gamma and lr together, and for weights that are not real.
    """

    _moments = ("momentum",)

    def __init__(self, params: ParamsT, gamma: float | None = None, threshold: float = 1e-8, *,
                 lr: float | None = None, foreach: bool | None = None) -> None:
        super().__init__(params, gamma, lr, 1e-4, foreach, threshold=threshold)

    def _tests(self, group, grads, *moments):
        (momentum,) = moments
        torch._foreach_lerp_(momentum, grads, float(group["lr"]))
        return momentum


class Bop2ndOrder(_FlipOptimizer):
    """Bop with a second moment, as Adam is to SGD.

        m <- m + gamma (g - m)
        v <- v + sigma (g^2 - v)
        flip w where w m / (sqrt(v) + 1e-10) > threshold

    and w = +1 at equality; m = v = 0 at first. unbiased=True tests

        w (m / gamma) / (sqrt(v / sigma) + 1e-10) > threshold

    which is the published code's correction: the factors of Adam's first step, 1 / gamma and
    1 / sigma, are kept in all steps, and are those of the scheduled gamma and sigma. A step with
    gamma = 0 or sigma = 0 then leaves the weights as they are.

    params, foreach, gamma (the group's "lr"; None: 1e-6), lr and threshold: as `Bop`. sigma: the
    rate of v in [0, 1]. The defaults are those of the published code; its CIFAR-10 runs use
    gamma=1e-7, sigma=1e-3.

    state_dict: momentum and variance of each weight, float32 (float64 for float64). Sources: CVPRW
    2021; its code for the defaults, 1e-10 and the unbiased form. Raises ValueError for a gamma,
    sigma or threshold out of range and for weights that are not real.
    """

    _moments = ("momentum", "variance")

    def __init__(self, params: ParamsT, gamma: float | None = None, threshold: float = 1e-6,
                 sigma: float = 1e-2, unbiased: bool = False, *, lr: float | None = None,
                 foreach: bool | None = None) -> None:
        super().__init__(params, gamma, lr, 1e-6, foreach, threshold=threshold, sigma=sigma,
                         unbiased=unbiased)

    def _tests(self, group, grads, *moments):
        momentum, variance = moments
        gamma, sigma = float(group["lr"]), float(group["sigma"])
        torch._foreach_lerp_(momentum, grads, gamma)
        torch._foreach_lerp_(variance, torch._foreach_mul(grads, grads), sigma)
        if group["unbiased"]:
            if gamma == 0 or sigma == 0:
                return None
            momentum = torch._foreach_div(momentum, gamma)
            variance = torch._foreach_div(variance, sigma)
        root = torch._foreach_sqrt(variance)
        torch._foreach_add_(root, EPSILON)
        return torch._foreach_div(momentum, root)
