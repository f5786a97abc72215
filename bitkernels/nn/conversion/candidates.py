"""Which layers `binarize` can make binary, and what becomes of the others."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from bitkernels.nn.conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from bitkernels.nn.conv_transpose import BinaryConvTranspose1d, BinaryConvTranspose2d
from bitkernels.nn.conversion.graph import LAYERS
from bitkernels.nn.hooks import is_patched
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.linear import BinaryLinear

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Conv3d: BinaryConv3d,
    nn.ConvTranspose1d: BinaryConvTranspose1d,
    nn.ConvTranspose2d: BinaryConvTranspose2d,
    nn.Linear: BinaryLinear,
}


def twin_class(module: nn.Module) -> type[nn.Module] | None:
    """The binary class for a layer, None if it has none. Parametrizations are kept."""
    cls = type(module)
    if not parametrize.is_parametrized(module):
        return TWINS.get(cls)
    base: Any = TWINS.get(cls.__bases__[0])
    if base is None:
        return None
    own = {key: value for key, value in vars(cls).items()
           if key not in ("__module__", "__dict__", "__weakref__", "__doc__")}
    return type(f"Parametrized{base.__name__}", (base,), own)


def why_real(module: nn.Module) -> str | None:
    """Why a layer that was asked to be binary stays real, or None if it need not."""
    if isinstance(module, BinaryLayer) or twin_class(module) is not None:
        return None
    cls = type(module)
    kinds = [kind for kind in TWINS if isinstance(module, kind)]
    if kinds:
        return (f"{cls.__name__} is a subclass of nn.{kinds[0].__name__}, whose own code a binary "
                "layer would lose")
    return f"there is no binary {cls.__name__}"


def is_quantized(module: nn.Module) -> bool:
    """Whether PyTorch made an integer layer of it, which shares no class with the real one."""
    cls = type(module)
    return cls.__module__.startswith("torch.ao.nn") and not isinstance(module, LAYERS) and (
        cls.__name__.startswith(("Conv", "Linear")) and not cls.__name__.endswith("Params"))


def refusal(module: nn.Module) -> str | None:
    """Why a layer cannot be made binary as it is, with what to do, or None."""
    if not is_patched(module):
        return None
    if vars(module).get("_compiled_call_impl") is not None:
        return "it is compiled by .compile(); binarize first, then compile"
    return ("its forward was replaced on the instance and would go on computing the real layer; "
            "binarize first, or take it back, as by accelerate.hooks.remove_hook_from_module")
