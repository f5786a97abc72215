"""Modules that read the weight of a child and never call it: a binary layer would run on its real
weight there, in silence.

A child cannot know that it is not called, so this looks when it is assigned, by torch's own hook.
"""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.packed import _Packed
from bitkernels.nn.source import reads_alone

_NOT_REAL = (BinaryLayer, _Packed)


def keep_off_fused_paths(model: nn.Module) -> None:
    """Turns PyTorch's fused inference off in transformer layers that have such a child, and the
    nested tensors that it makes of padded batches, which fit nothing else."""
    for module in model.modules():
        if any(isinstance(m, _NOT_REAL) for m in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # by which PyTorch itself turns it off
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _assigned(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if not isinstance(child, _NOT_REAL):
        return
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0
    elif (isinstance(parent, nn.MultiheadAttention)
            and type(parent).forward is nn.MultiheadAttention.forward):
        raise ValueError(f"{type(parent).__name__}: {name} must be a real layer, got "
                         f"{type(child).__name__}: the attention reads its weight and never calls "
                         "it")
    elif isinstance(child, BinaryLayer) and _is_users(parent) and reads_alone(type(parent), name):
        warnings.warn(
            f"{type(parent).__name__}: its code reads {name}.weight and never calls {name}, a "
            f"{type(child).__name__}: it computes with the real weight. Call the layer, or keep it "
            "real", stacklevel=3)


def _is_users(parent: nn.Module) -> bool:
    return not type(parent).__module__.startswith(("torch.", "bitkernels."))


register_module_module_registration_hook(_assigned)
