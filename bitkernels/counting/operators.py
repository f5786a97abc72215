"""How many products an operator computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from bitkernels.ops.geometry import weight_shape

_aten = torch.ops.aten
_ours = torch.ops.bitkernels

# Operators that read matrices of weights and multiply none.
_READS = {
    _aten.cat, _aten.stack, _aten.embedding, _aten._embedding_bag,
    _aten._embedding_bag_forward_only, _aten.index, _aten.index_select, _aten.index_put,
    _aten.gather, _aten.copy, _aten.copy_, _aten.native_layer_norm, _aten._fused_rms_norm,
    _aten.native_group_norm, _aten.native_batch_norm, _aten._native_batch_norm_legit,
    _aten._native_batch_norm_legit_no_training, _aten.cudnn_batch_norm, _aten.batch_norm_elemt,
    _aten.constant_pad_nd, _aten.clone, _aten.slice_scatter, _aten.select_scatter,
    _ours.rsign, _ours.rprelu, _ours.sign_pack, _ours.sign_pack_mask, _ours.unpack,
    _ours.tile_weight,
}


def _pixels(out: Any) -> int:
    """Batch times image of (N, C, H, W)."""
    return out.shape[0] * math.prod(out.shape[2:])


def _latent_conv(func: Any, arguments: dict[str, Any], out: Any) -> int:
    return arguments["weight"].numel() * _pixels(out[0] if isinstance(out, (tuple, list)) else out)


def _packed_conv(func: Any, arguments: dict[str, Any], out: Any) -> int:
    first = out[0] if isinstance(out, (tuple, list)) else out
    pixels = (math.prod(first.shape[:-1]) if func._overloadname == "packed"  # (N, H, W, words)
              else _pixels(first))
    cout, kh, kw, _ = weight_shape("packed_conv2d", arguments["weight_words"],
                                   arguments["out_channels"], arguments["groups"])
    return cout * kh * kw * pixels * (arguments["channels"] // arguments["groups"])


def _packed_linear(func: Any, arguments: dict[str, Any], out: Any) -> int:
    cout, _ = weight_shape("packed_linear", arguments["weight_words"], arguments["out_channels"], 1)
    return math.prod(arguments["words"].shape[:-1]) * cout * arguments["channels"]


def _transposed(func: Any, arguments: dict[str, Any], out: Any) -> int:
    """Every pixel of the input meets every tap."""
    return arguments["weight"].numel() * _pixels(arguments["input"])


def _packed_transposed(func: Any, arguments: dict[str, Any], out: Any) -> int:
    words, input = arguments["weight_words"], arguments["words"]
    return (math.prod(words.shape[:-1]) * (arguments["channels"] // arguments["groups"])
            * math.prod(input.shape[:-1]))


def _linear(func: Any, arguments: dict[str, Any], out: Any) -> int:
    input, weight = arguments["input"], arguments["weight"]
    return math.prod(input.shape[:-1]) * weight.numel()


_OURS: dict[Any, Callable[[Any, dict[str, Any], Any], int]] = {
    _ours.binary_conv2d: _latent_conv, _ours.binary_conv2d_forward: _latent_conv,
    _ours.binary_residual_block: _latent_conv, _ours.packed_conv2d: _packed_conv,
    _ours.packed_conv2d_moments: _packed_conv, _ours.packed_conv2d_recompute: _packed_conv,
    _ours.binary_linear: _linear,
    _ours.packed_linear: _packed_linear, _ours.binary_conv_transpose2d: _transposed,
    _ours.packed_conv_transpose2d: _packed_transposed,
}
_INT8: dict[Any, Callable[[Any, dict[str, Any], Any], int]] = {
    _ours.int8_conv2d: _latent_conv, _ours.int8_linear: _linear}
# (which argument is the matrix): products of a matrix and a vector, which torch's list lacks.
_VECTORS: dict[Any, int] = {_aten.mv: 0, _aten.addmv: 1, _aten.dot: 0, _aten.vdot: 0}


def macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """Multiply-adds of a call of an operator; None for one that is not known to multiply."""
    packet = func.overloadpacket
    if product := _OURS.get(packet) or _INT8.get(packet):
        return product(func, _named(func, args, kwargs), out)
    if packet in _VECTORS:
        return args[_VECTORS[packet]].numel()
    if packet is _aten.mkldnn_rnn_layer:  # (T, N, ...) by the weights of input and of state
        return math.prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel())
    if packet in flop_registry:  # two a multiply-add
        return flop_registry[packet](*args, **kwargs, out_val=out) // 2
    return None


def of_signs(func: Any) -> bool:
    """Whether its products are of one bit."""
    return func.overloadpacket in _OURS


def multiplies_perhaps(func: Any) -> bool:
    """Whether an operator that `macs` does not know could compute products with weights."""
    return not (func.overloadpacket in _READS or torch.Tag.pointwise in func.tags or func.is_view)


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named
