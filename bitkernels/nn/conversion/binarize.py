"""Real layers of a whole model to binary ones, for training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from bitkernels import quantizers
from bitkernels.nn.conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from bitkernels.nn.conv_transpose import BinaryConvTranspose1d, BinaryConvTranspose2d
from bitkernels.nn.layer import QuantizerLike, WeightScale
from bitkernels.nn.linear import BinaryLinear

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Conv3d: BinaryConv3d,
    nn.ConvTranspose1d: BinaryConvTranspose1d,
    nn.ConvTranspose2d: BinaryConvTranspose2d,
    nn.Linear: BinaryLinear,
}

_LAYERS: tuple[type[nn.Module], ...] = (*_TWINS, nn.ConvTranspose3d)


def binarize(model: nn.Module, *, skip_first: bool = True, skip_last: bool = True,
             filter: Callable[[str, nn.Module], bool] | None = None,
             input_quantizer: QuantizerLike = "ste_sign",
             weight_quantizer: QuantizerLike = "ste_sign", weight_scale: WeightScale = None,
             pad_value: int = 0) -> nn.Module:
    """Make the convolutions and linear layers of a model binary, in place, and return the model.

    Layers of exactly the classes nn.Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d and
    Linear are replaced; subclasses and layers that are binary already stay. The new layers own the
    same Parameter objects (an optimizer stays valid), hooks and training flag; a layer that is used
    in several places stays one layer.

    skip_first, skip_last: leave the first and last convolution or linear layer of the model real,
      in the order of registration, as all published binary networks but the first ones do. A model
      that is itself one such layer is always replaced: take the returned module.
    filter: called with (name, module) for each layer left; a false answer keeps it real.
    The other options are those of the layers (`BinaryLayer`, `BinaryConv2d`); each layer gets its
    own copy of a quantizer module. pad_value goes to the convolutions.

    Raises ValueError for options that do not fit a layer, before anything is replaced.
    """
    options: dict[str, Any] = dict(input_quantizer=quantizers.get(input_quantizer),
                                   weight_quantizer=quantizers.get(weight_quantizer),
                                   weight_scale=weight_scale)
    if type(model) in _TWINS:
        keep = filter is not None and not filter("", model)
        return model if keep else _binary_twin(model, options, pad_value)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
    skipped = {id(m) for _, m in layers[:1] if skip_first}
    skipped |= {id(m) for _, m in layers[-1:] if skip_last}
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in layers:
        if type(module) not in _TWINS or id(module) in skipped:
            continue
        if filter is None or filter(name, module):
            twins[module] = _binary_twin(module, options, pad_value, name)
    _replace(model, twins)
    return model


def _binary_twin(module: nn.Module, options: dict[str, Any], pad_value: int,
                 name: str = "") -> nn.Module:
    """A binary layer with all the state of a real one, which it replaces."""
    cls: Any = _TWINS[type(module)]
    twin = cls.__new__(cls)
    for key, value in module.__dict__.items():
        twin.__dict__[key] = value.copy() if isinstance(value, dict) else value
    try:
        if not isinstance(module, nn.Linear):
            twin._set_padding(pad_value)
        twin._configure(**{key: copy.deepcopy(value) for key, value in options.items()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from None
    return twin.train(module.training)


def _replace(model: nn.Module, twins: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        replaced = False
        for name, child in list(parent._modules.items()):
            if child in twins:
                setattr(parent, name, twins[child])
                replaced = True
        if replaced and isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused inference path reads linear1.weight and never calls linear1; 0 is what
            # PyTorch itself sets to turn that path off.
            parent.activation_relu_or_gelu = 0
