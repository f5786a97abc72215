"""Hooks of a layer that go with it to its inference twin, and those that cannot."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from bitkernels.nn.latent import recomputed_by

_CALLED = ("forward", "_conv_forward", "_call_impl", "__call__")
_LEFT = {"_backward_hooks": "backward hooks", "_backward_pre_hooks": "backward hooks",
         "_state_dict_hooks": "state_dict hooks", "_state_dict_pre_hooks": "state_dict hooks",
         "_load_state_dict_pre_hooks": "state_dict hooks",
         "_load_state_dict_post_hooks": "state_dict hooks"}


def carry_forward_hooks(layer: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Give the twin a layer's forward hooks and pre-hooks, as a deep copy of the layer has them.

    Those by which torch recomputes the weight (pruning, norms) stay behind. memo: of the deep copy
    of the model, so that a method of a module is that of the module's copy.
    """
    for kind in ("forward_pre", "forward"):
        hooks = getattr(layer, f"_{kind}_hooks")
        kept = {key: copy.deepcopy(hook, memo) for key, hook in hooks.items()
                if recomputed_by(hook) is None}
        getattr(twin, f"_{kind}_hooks").update(kept)
        for flag in ("with_kwargs", "always_called"):
            flags = getattr(layer, f"_{kind}_hooks_{flag}", {})
            getattr(twin, f"_{kind}_hooks_{flag}", {}).update(
                {key: value for key, value in flags.items() if key in kept})


def left_hooks(layer: nn.Module) -> list[str]:
    """What kinds of hooks have no place on an inference twin."""
    ours = {kind for place, kind in _LEFT.items() for hook in getattr(layer, place).values()
            if not getattr(hook, "hook", hook).__module__.startswith("torch.nn.utils.")}
    return sorted(ours)


def replaced(module: nn.Module, names: Collection[str] = _CALLED) -> str | None:
    """The first of the methods that was set on the instance, None if none was.

    What accelerate leaves when it takes its hook off is the class's own method.
    """
    set_here = vars(module)
    for name in names:
        own = set_here.get(name)
        if own is None:
            continue
        of_class = getattr(own, "__func__", None) is getattr(type(module), name, None)
        if not (of_class and own.__self__ is module):
            return name
    return None


def is_patched(module: nn.Module) -> bool:
    """Whether a call of the module runs something else than the code of its class."""
    return replaced(module) is not None or vars(module).get("_compiled_call_impl") is not None
