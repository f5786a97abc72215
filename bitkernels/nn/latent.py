"""What stands behind a binary layer's weight: pruning, norms, parametrizations, shards.

`torch.nn.utils.prune` and the old `weight_norm` and `spectral_norm` make `weight` an attribute that
a forward pre-hook computes from other tensors, so between two calls it may be old.
`torch.nn.utils.parametrize` makes it a property. In both the optimizer's parameter has another
name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

ZEROS = 0.01  # a larger share of exact zeros is not chance, but a mask


def recomputed_by(hook: Any) -> str | None:
    """The name of the tensor that a forward pre-hook of torch recomputes; None for other hooks."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name
    return hook.name if isinstance(hook, (WeightNorm, SpectralNorm)) else None


@contextlib.contextmanager
def weight_of_now(layer: nn.Module) -> Iterator[None]:
    """Inside, weight and bias are those that the next evaluation computes with; without gradient.

    Nothing of the layer is changed afterwards, nor the power iteration of a spectral norm.
    """
    before: dict[str, Any] = {}
    parametrizations = layer._modules.get("parametrizations")
    training = [m for m in parametrizations.modules() if m.training] if parametrizations else []
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            for hook in layer._forward_pre_hooks.values():
                name = recomputed_by(hook)
                if name is None:
                    continue
                before.setdefault(name, layer.__dict__.get(name))
                if isinstance(hook, BasePruningMethod):
                    value = hook.apply_mask(layer)
                elif isinstance(hook, SpectralNorm):
                    value = hook.compute_weight(layer, do_power_iteration=False)
                else:
                    value = hook.compute_weight(layer)  # type: ignore[attr-defined]
                layer.__dict__[name] = value
            yield
    finally:
        for module in training:
            module.training = True
        for name, value in before.items():
            if value is None:
                layer.__dict__.pop(name, None)
            else:
                layer.__dict__[name] = value


def latent_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters whose signs decide the signs of `layer.weight`: one, shaped as the weight.

    The weight itself; `weight_orig` of a pruned or spectrally normed one; the direction `weight_v`
    of a weight norm, not its magnitude; the original of a parametrized one. Empty where none has
    the shape of the weight (a low-rank parametrization), and for a weight that is no parameter.
    """
    own = layer._parameters.get("weight")
    if own is not None:
        return [own]
    for name in ("weight_orig", "weight_v"):
        found = layer._parameters.get(name)
        if found is not None:
            return [found]
    parametrizations: Any = layer._modules.get("parametrizations")
    if parametrizations is None or "weight" not in parametrizations:
        return []
    original = parametrizations["weight"]
    shape = layer.weight.shape
    return [p for name, p in original._parameters.items()
            if name.startswith("original") and p is not None and p.shape == shape][-1:]


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a distributed tensor; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, as fully_shard makes of parameters."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def zeros_warning(weight: Tensor, name: str) -> str | None:
    """A sentence on exact zeros among the weights, None where there are next to none."""
    if not weight.numel() or weight.is_meta:
        return None
    share = float((weight == 0).sum()) / weight.numel()
    if share <= ZEROS:
        return None
    return (f"{name}: {share:.0%} of the weights are 0 (pruned?), and a bit cannot be 0: the sign "
            "of 0 is +1, so these weights count as +1")


def folded_factor(old: Tensor, new: Tensor) -> bool:
    """Whether `new` is `old` times a factor for each channel, not all of them 1.

    That is what folding a batch norm into a convolution makes. Signs drop the factors. Channels of
    one weight tell nothing: any weights are such multiples of any others.
    """
    if (old.shape != new.shape or old.is_meta or new.is_meta or old.device != new.device
            or old.dim() < 2 or not old.numel() or not type(old) is type(new) is nn.Parameter):
        return False
    a, b = old.detach().double(), new.detach().double()
    rounding = 16 * max(torch.finfo(old.dtype).eps, torch.finfo(new.dtype).eps)
    for dim in (0, 1):  # output channels; those of transposed convolutions
        if a.numel() == a.shape[dim]:
            continue
        others = [d for d in range(a.dim()) if d != dim]
        square = (a * a).sum(others, keepdim=True)
        factor = (a * b).sum(others, keepdim=True) / square.clamp_min(1e-300)
        size = (a * factor).abs()
        if bool(((b - a * factor).abs() <= rounding * (size + b.abs())).all()):
            used = square > 0
            return bool(((factor - 1).abs() > 1e-4)[used].any())
    return False
