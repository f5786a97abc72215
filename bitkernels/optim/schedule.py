"""Any hyperparameter of an optimizer as what a torch scheduler drives."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch.optim.optimizer import Optimizer

from bitkernels._arguments import refuse

__all__ = ["ScheduledHyperparameter"]


class _GroupView(MutableMapping):
    """A parameter group whose "lr" and "initial_lr" are another hyperparameter's."""

    def __init__(self, group: dict[str, Any], name: str) -> None:
        self._group = group
        self._keys = {"lr": name, "initial_lr": f"initial_{name}"}

    def __getitem__(self, key: str) -> Any:
        return self._group[self._keys.get(key, key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self._group[self._keys.get(key, key)] = value

    def __delitem__(self, key: str) -> None:
        del self._group[self._keys.get(key, key)]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._keys.get(key, key) in self._group

    def __iter__(self) -> Iterator[str]:
        back = {theirs: ours for ours, theirs in self._keys.items()}
        return (back.get(key, key) for key in self._group if key not in self._keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ScheduledHyperparameter(Optimizer):
    """A face of an optimizer that shows a scheduler one hyperparameter as the learning rate.

        threshold = ScheduledHyperparameter(bop, "threshold")
        schedule = torch.optim.lr_scheduler.LambdaLR(threshold, lambda epoch: 0.9 ** epoch)

    `schedule.step()` then sets group["threshold"] in each group of `bop` and leaves its "lr" to
    another scheduler. The values live in the optimizer, in whose state_dict they are; one optimizer
    may have a face for each hyperparameter. The face is for schedulers only.

    Raises ValueError for a name that some group does not have, and for "lr", which schedulers drive
    on the optimizer itself; RuntimeError from step, zero_grad, state_dict and load_state_dict.
    """

    def __init__(self, optimizer: Optimizer, name: str) -> None:
        if not isinstance(optimizer, Optimizer):
            refuse("ScheduledHyperparameter", "optimizer", "one of torch.optim", optimizer)
        if name in ("lr", "gamma"):
            raise ValueError(f"ScheduledHyperparameter: name {name!r} is the learning rate: give "
                             "the scheduler the optimizer")
        for i, group in enumerate(optimizer.param_groups):
            if name not in group:
                raise ValueError(
                    f"ScheduledHyperparameter: name must be that of a hyperparameter, parameter "
                    f"group {i} of {type(optimizer).__name__} has no {name!r}, only "
                    f"{sorted(set(group) - {'params'})}")
        self.target, self.name = optimizer, name
        self.defaults = {}
        # Schedulers warn when they step before the optimizer did.
        optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, *_: Any) -> None:
        self._opt_called = True

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        return [_GroupView(group, self.name) for group in self.target.param_groups]

    def __repr__(self) -> str:
        return f"ScheduledHyperparameter({self.name!r} of {type(self.target).__name__})"

    def _refuse(self) -> None:
        raise RuntimeError(f"{self!r} is for schedulers; use the optimizer itself")

    def step(self, closure: Any = None) -> Any:
        self._refuse()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._refuse()

    def state_dict(self) -> dict[str, Any]:
        self._refuse()
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._refuse()
