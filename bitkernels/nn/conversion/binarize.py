"""Real layers of a whole model to binary ones, for training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bitkernels import quantizers
from bitkernels._arguments import choice, flag, function
from bitkernels.nn.arguments import pad_value_of
from bitkernels.nn.conv import BinaryConv1d, BinaryConv2d, BinaryConv3d
from bitkernels.nn.conversion.activations import (
    ACTIVATIONS,
    Activation,
    is_replaceable,
    replacement,
)
from bitkernels.nn.conversion.analysis import UNKNOWN, Analysis, Source, analyse
from bitkernels.nn.conversion.candidates import (
    is_quantized,
    refusal,
    twin_class,
    why_real,
)
from bitkernels.nn.conversion.checks import check_model
from bitkernels.nn.conversion.graph import LAYERS, is_depthwise
from bitkernels.nn.conversion.norm_sign import NormSign
from bitkernels.nn.conversion.report import BinarizeReport, by_value
from bitkernels.nn.conversion.values import module_kind
from bitkernels.nn.layer import BinaryLayer
from bitkernels.nn.options import Binarization, QuantizerLike, WeightScale
from bitkernels.nn.packed import _Packed
from bitkernels.nn.parents import keep_off_fused_paths

_PADDED = (BinaryConv1d, BinaryConv2d, BinaryConv3d)


def binarize(model: nn.Module, *, skip_first: bool = True, skip_last: bool = True,
             filter: Callable[[str, nn.Module], bool] | None = None,
             activation: Activation = "prelu", keep_downsample: bool = True,
             keep_depthwise: bool = True, keep_gates: bool = True,
             keep_expansions: bool = True, example_inputs: Any = None,
             input_quantizer: QuantizerLike = "ste_sign",
             weight_quantizer: QuantizerLike = "ste_sign", weight_scale: WeightScale = None,
             pad_value: int = 0, verbose: bool = False,
             report: Callable[[BinarizeReport], Any] | None = None) -> nn.Module:
    """Make the convolutions and linear layers of a model binary, in place, and return the model.

    Layers of the classes nn.Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d and Linear
    become binary, with their parametrizations, hooks, Parameter objects (an optimizer stays valid
    for them) and training flag; they stay the same objects. Layers that are binary already stay as
    they are.

    The sign of what a ReLU gives is +1 everywhere, and a network of such signs does not see its
    input. So `binarize` follows the values of the model's graph (`torch.fx`) from activations that
    are never negative through pooling, dropout, reshaping, concatenation, addition and gates to
    the layers that become binary. The activations on the way are replaced; a layer behind one that
    is not a module (`F.relu`) gets a batch norm before its sign (`NormSign`). Their parameters are
    new: make the optimizer after `binarize`.

    skip_first, skip_last: leave the first and last convolution or linear layer real, as all
      published binary networks but the first ones do: those that depend on no other, and those on
      which no other depends (several, where a model has several inputs or heads). A model that is
      itself one such layer is always replaced: take the returned module.
    filter: called with (name, module) for each layer left; a false answer keeps it real.
    activation: what replaces activations that are never negative: "prelu" and "rprelu" (with a
      first slope of 0.25, per channel where the channels are known and the same in all calls, else
      nn.PReLU()), "hardtanh", or "keep" to change no activation and add no batch norm.
    keep_downsample: leave 1x1 convolutions on the shortcut of a residual block real.
    keep_depthwise: leave depthwise convolutions (groups = in_channels) real.
    keep_gates: leave the layers of gates (squeeze-and-excitation) real.
    keep_expansions: leave 1x1 convolutions of less than 128 channels to at least twice as many, in
      front of depthwise ones, real: MobileNetV2's blocks begin so. The signs of few channels say
      little of the input, and a product of few is no faster than the real one.
    example_inputs: a tensor, a tuple of arguments or a dict of named ones. The model is run on them
      once to see the order of its calls, for models whose code torch.fx cannot trace.
    verbose, report: print what was done and why; call `report` with it, a `BinarizeReport`
      (`reports = []; binarize(model, report=reports.append)`).
    The other options are those of the layers (`BinaryLayer`, `BinaryConv2d`); each layer gets its
    own copy of a quantizer module. pad_value goes to the convolutions. With an input_quantizer that
    is not binary (DoReFa, NoOp(precision=32)) no activation is changed.

    One UserWarning names the layers that stay real though no option says so: subclasses, layers
    whose weight is read by the code of a parent, which would compute with the real weight, and
    kinds that have no binary layer. Another one names those that could not be analysed.

    Raises ValueError for options that do not fit a layer, for layers whose `forward` was replaced
    on the instance or that were compiled, and for lazy layers that have no shapes yet, before
    anything is changed.
    """
    check_model("binarize", model)
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ValueError("cannot binarize a model compiled by torch.jit; binarize it first")
    choice("binarize", "activation", activation, ACTIVATIONS)
    for name, value in dict(
            skip_first=skip_first, skip_last=skip_last, keep_downsample=keep_downsample,
            keep_depthwise=keep_depthwise, keep_gates=keep_gates, keep_expansions=keep_expansions,
            verbose=verbose).items():
        flag("binarize", name, value)
    for name, called in dict(filter=filter, report=report).items():
        if called is not None:
            function("binarize", name, called)
    pad_value = pad_value_of("binarize", pad_value, "zeros")
    checked = Binarization(input_quantizer, weight_quantizer, weight_scale)
    options: dict[str, Any] = dict(input_quantizer=checked.input_quantizer,
                                   weight_quantizer=checked.weight_quantizer,
                                   weight_scale=checked.weight_scale)
    layers: dict[nn.Module, str] = {
        m: name for name, m in model.named_modules() if isinstance(m, LAYERS)}
    if isinstance(model, LAYERS):
        return _lone(model, filter, options, pad_value, verbose, report)

    found = analyse(model, example_inputs)
    said = BinarizeReport()
    unexpected: dict[str, str] = {}
    refused: dict[str, str] = {}
    plans: dict[nn.Module, Binarization] = {}
    for module, name in layers.items():
        if isinstance(module, (BinaryLayer, _Packed)):
            continue
        reason = _option(module, found, dict(
            skip_first=skip_first, skip_last=skip_last, keep_downsample=keep_downsample,
            keep_depthwise=keep_depthwise, keep_gates=keep_gates, keep_expansions=keep_expansions))
        if reason is None and filter is not None and not filter(name, module):
            reason = "filter"
        if reason is None:
            obstacle = refusal(module)
            refused |= {name: obstacle} if obstacle else {}
            reason = why_real(module)
            if reason is None and module in found.read:
                reason = "code of a parent reads its weight itself, and would get the real one"
            unexpected |= {name: reason} if reason else {}
        if reason is not None:
            said.kept[name] = reason
        elif not refused:
            plans[module] = _plan(module, options, pad_value, name)
    unexpected |= {name: "it is quantized already" for name, m in model.named_modules()
                   if is_quantized(m)}
    said.kept |= unexpected
    if refused:
        raise ValueError(f"cannot binarize {_grouped(refused)}")
    activations: dict[nn.Module, nn.Module] = {}
    if quantizers.is_binary(options["input_quantizer"]):
        activations = _prepare_inputs(model, plans, found, activation, said)

    # Where warnings are errors, nothing is changed yet.
    _warn("these layers stay real", unexpected)
    _warn("torch.fx cannot trace the calls of these layers; give example_inputs, or check that no "
          "ReLU is before their sign and that their parents call them",
          dict.fromkeys(said.not_analysed, "order of registration"))
    if not plans and not unexpected and filter is None and not any(
            isinstance(m, (BinaryLayer, _Packed)) for m in layers):
        _warn("no layer became binary", said.kept or {type(model).__name__: "it has none to take"})
    for module, own in plans.items():
        _make_binary(module, own, pad_value)
    for module, new in activations.items():
        _become(module, new)
    keep_off_fused_paths(model)
    said.binary |= {layers[m]: type(m).__name__ for m in plans}
    said.count(model)
    _say(said, verbose, report)
    return model


def _lone(model: Any, filter, options: dict[str, Any], pad_value: int, verbose: bool,
          report: Callable[[BinarizeReport], Any] | None) -> nn.Module:
    if isinstance(model, (BinaryLayer, _Packed)) or (filter is not None and not filter("", model)):
        return model
    if refusal(model):
        raise ValueError(f"cannot binarize this layer: {refusal(model)}")
    reason = why_real(model)
    if reason:
        _warn("this layer stays real", {type(model).__name__: reason})
        return model
    own = _plan(model, options, pad_value)
    # A layer with the same tensors, parametrizations and hooks.
    shared = [value for held in vars(model).values() if isinstance(held, dict)
              for value in held.values()]
    shared += [value for value in vars(model).values() if isinstance(value, torch.Tensor)]
    twin = copy.deepcopy(model, {id(value): value for value in shared})
    _make_binary(twin, own, pad_value)
    said = BinarizeReport(binary={"": type(twin).__name__})
    said.count(twin)
    _say(said, verbose, report)
    return twin


def _say(said: BinarizeReport, verbose: bool,
         report: Callable[[BinarizeReport], Any] | None) -> None:
    if verbose:
        print(said)
    if report is not None:
        report(said)


def _option(module: Any, found: Analysis, options: dict[str, bool]) -> str | None:
    """The option by which a layer stays real, if there is one."""
    for name, text, applies in (
            ("skip_first", "first layer", module in found.first),
            ("skip_last", "last layer", module in found.last),
            ("keep_downsample", "1x1 convolution on a shortcut", module in found.shortcuts),
            ("keep_depthwise", "depthwise convolution", is_depthwise(module)),
            ("keep_gates", "layer of a gate", module in found.gates),
            ("keep_expansions", "1x1 convolution of few channels to more",
             module in found.expansions)):
        if options[name] and applies:
            return f"{text} ({name})"
    return None


def _warn(text: str, entries: dict[str, str]) -> None:
    if entries:
        warnings.warn(f"binarize: {text}: {_grouped(entries)}", stacklevel=3)


def _grouped(entries: dict[str, str]) -> str:
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_value(entries))


def _prepare_inputs(model: nn.Module, plans: dict[nn.Module, Binarization], found: Analysis,
                    activation: Activation, said: BinarizeReport) -> dict[nn.Module, nn.Module]:
    """What replaces activations; plans a batch norm where there is none to replace."""
    names = {m: name for name, m in model.named_modules()}
    replaced: dict[nn.Module, nn.Module] = {}
    for module, options in plans.items():
        sources = found.sources.get(module, frozenset([UNKNOWN]))
        if UNKNOWN in sources:
            said.not_analysed.append(names[module])
            sources = sources - {UNKNOWN} | _registered_near(model, module)
        normed = {s for s in sources if s.normed}
        sources = sources - normed
        if activation == "keep":
            if sources:
                said.single_signed[names[module]] = ", ".join(sorted(s.name for s in sources))
            continue
        own = next(module.parameters())
        place: dict[str, Any] = dict(device=own.device, dtype=own.dtype)
        fixed = sorted({s.name for s in sources if not is_replaceable(s.module)})
        reason = f"behind {', '.join(fixed)}" if fixed else None
        if not fixed:
            for old in (s.module for s in sources | normed):
                if old is not None and old not in replaced and is_replaceable(old):
                    new = replacement(activation, found.channels.get(old, {None}), **place)
                    replaced[old] = new
                    said.activations[names[old]] = f"{type(old).__name__} -> {new!r}"
            if any(s.pooled for s in sources):
                reason = "behind max pooling, which leaves few negative values"
            elif options.weight_scale is None and any(m in plans for m in found.raw[module]):
                reason = "behind a binary layer with no norm, whose integers no gradient passes"
        if reason is not None:
            said.normalized[names[module]] = reason
            layer: Any = module
            linear = isinstance(layer, nn.Linear)
            plans[module] = replace(options, input_quantizer=NormSign(
                layer.in_features if linear else layer.in_channels,
                0 if linear else len(layer.kernel_size), options.input_quantizer, **place))
    return replaced


def _registered_near(model: nn.Module, layer: nn.Module) -> frozenset[Source]:
    """The source by the order of registration, where the order of the calls is not known; where
    that has none, the activations of the nearest module around the layer that has some."""
    leaves = [(name, m) for name, m in model.named_modules()
              if isinstance(m, LAYERS) or not any(True for _ in m.children())]
    place = next(i for i, (_, m) in enumerate(leaves) if m is layer)
    for name, module in reversed(leaves[:place]):
        kind = module_kind(module)
        if kind == "source":
            return frozenset([Source(name, module)])
        if kind != "keeps":
            break
    path = leaves[place][0]
    while path:
        path = path.rpartition(".")[0]
        near = frozenset(Source(f"{path}.{name}".lstrip("."), m) for name, m in
                         model.get_submodule(path).named_children() if module_kind(m) == "source")
        if near:
            return near
    return frozenset()


def _plan(module: Any, options: dict[str, Any], pad_value: int, name: str = "") -> Binarization:
    """The options of one layer, with quantizers of its own; ValueError where they do not fit it."""
    cls: Any = twin_class(module)
    where = f"{name}: {cls.__name__}" if name else cls.__name__
    if issubclass(cls, _PADDED):
        pad_value_of(where, pad_value, module.padding_mode)
    try:
        return Binarization(**{key: copy.deepcopy(value) for key, value in options.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _make_binary(module: Any, options: Binarization, pad_value: int) -> None:
    """A binary layer is a real one of another class, and its options."""
    for name in ("forward", "_conv_forward"):
        vars(module).pop(name, None)  # those of its class (`refusal`)
    module.__class__ = twin_class(module)
    if isinstance(module, _PADDED):
        module.pad_value = pad_value
    module.binarization = options
    module.train(module.training)


def _become(module: nn.Module, new: nn.Module) -> None:
    """Turn a module into another one. It stays the same object: a parent that keeps it in a list of
    its own calls the new one, and handles of hooks stay valid."""
    kept = {key: value for key, value in module.__dict__.items()
            if "hook" in key or key == "training"}
    module.__class__ = type(new)
    module.__dict__.clear()
    module.__dict__.update(new.__dict__ | kept)
