"""Binary layers of a whole model to packed ones, for inference."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from bitkernels._arguments import function
from bitkernels.nn.conversion.checks import check_model
from bitkernels.nn.hooks import carry_forward_hooks
from bitkernels.nn.latent import is_sharded
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.packed import _Packed
from bitkernels.nn.parents import keep_off_fused_paths


def pack(model: nn.Module, *,
         filter: Callable[[str, BinaryLayer], bool] | None = None) -> nn.Module:
    """A copy of a model for inference, with its binary layers packed to 1-bit weights.

    Every BinaryConv1d/2d, BinaryConvTranspose1d/2d and BinaryLinear becomes its inference twin
    (same outputs, no latent weights); all other modules are copied. The copy is in eval mode and
    none of its parameters requires grad. The model itself is not changed.

    The weights are those of now: pruned, normed or parametrized as the model's next evaluation
    would have them. Forward hooks and pre-hooks go with their layer. A module that was compiled in
    place is not compiled in the copy, as in any deep copy: compile what pack returns.

    filter: called with (name, layer) for each binary layer; one with a false answer is copied as it
      is. `lambda name, layer: layer.pack_obstacle() is None` packs what can be packed.

    Warns of a model without binary layers, of hooks that have no meaning on a packed layer
    (backward, state_dict) and of weights that are 0, which count as +1.

    Raises ValueError that names each binary layer which has no packed twin (three-dimensional, with
    a quantizer that is not binary, with a forward of its own class or instance, sharded), with the
    reason.
    """
    check_model("pack", model)
    if filter is not None:
        function("pack", "filter", filter)
    layers = [(name, m) for name, m in model.named_modules()
              if isinstance(m, (BinaryLayer, _Packed))]
    if not layers:
        warnings.warn(f"pack: {type(model).__name__} has no binary layer and comes back real; make "
                      "it binary first (bitkernels.nn.binarize)", stacklevel=2)
    binary = [(name, m) for name, m in layers if isinstance(m, BinaryLayer)
              and (filter is None or filter(name, m))]
    reasons = [(name or type(m).__name__, m.pack_obstacle()) for name, m in binary]
    obstacles = _sharded(model) + [f"{name}: {why}" for name, why in reasons if why is not None]
    if obstacles:
        raise ValueError("cannot pack " + "; ".join(obstacles))
    # The twins enter the copy in place of their layers, so latent weights are never copied.
    memo: dict[int, Any] = {}
    twins = [(layer, layer.packed_twin(name or type(layer).__name__, memo))
             for name, layer in binary]
    packed: nn.Module = copy.deepcopy(model, memo)
    for layer, twin in twins:
        carry_forward_hooks(layer, twin, memo)
    keep_off_fused_paths(packed)
    return packed.eval().requires_grad_(False)


def _sharded(model: nn.Module) -> list[str]:
    """The first module of the model that PyTorch has sharded, if there is one, in words."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if (fsdp is not None
                and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))
                or any(is_sharded(p) for p in module._parameters.values())):
            return [f"{name or type(module).__name__}: its parameters are sharded; load "
                    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) "
                    "into an unsharded model and pack that"]
    return []
