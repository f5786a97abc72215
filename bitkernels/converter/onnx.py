"""What `torch.onnx.export` gets of a converted network, since ONNX has no words.

The graph runs node by node with signs in the place of words: -1 and +1 in float32, channels last,
so that concatenations and flattenings of words stay what they are. Products become real
convolutions and matrix products, exact while a dot product fits float32. Weights stay words in the
file, a bit each, and are unpacked when a runtime loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitkernels import _onnx
from bitkernels.converter.net import WITH_WORDS, ops
from bitkernels.ops._contract import epilogue, shifted, sign

if TYPE_CHECKING:
    from bitkernels.converter.converted import Converted

_PARTS = ("clamp_min", "clamp_max", "scale", "bias", "residual", "shift_in", "slope", "shift_out")


class RealForm(fx.Interpreter):
    """Runs the graph of a converted network in operators that ONNX has."""

    def __init__(self, network: Converted) -> None:
        super().__init__(network.graph_module)
        self.network = network

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().get_attr(self.network.words_of(target), args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in WITH_WORDS:
            return _product(target, _given(target, args, kwargs))
        if target in _FORMS:
            return _FORMS[target](**_given(target, args, kwargs))
        return super().call_function(target, args, kwargs)


def _given(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = target._schema.arguments
    return {a.name: a.default_value for a in names} | {
        a.name: value for a, value in zip(names, args, strict=False)} | kwargs


def _product(target: Any, given: dict[str, Any]) -> Any:
    conv = target.overloadpacket is ops.packed_conv2d
    words, groups = given["words"], given.get("groups", 1)
    weight = _onnx.unpack(given["weight_words"], given["channels"] // groups)
    if conv:
        dot = _onnx.conv2d_of_signs(
            words.movedim(-1, 1), weight.movedim(-1, 1), given["stride"], given["padding"],
            given["dilation"], groups, given["pad_value"])
    else:
        dot = words @ weight.T
    # Integers already: without this exporters and runtimes fold what follows into the weights.
    real, signs = _outputs(dot.round(), 1 if conv else dot.dim() - 1, given)
    return {"packed": signs, "both": (real, signs)}.get(target._overloadname, real)


def _outputs(dot: Tensor, channel_dim: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if given.get("threshold") is not None:
        low, high = given["threshold"].float()
        last = dot.movedim(channel_dim, -1)
        return dot, torch.where((last >= low) & (last <= high), 1.0, -1.0)
    if given.get("dtype") is torch.int32:
        return dot.int(), sign(dot.movedim(channel_dim, -1))
    y = epilogue(dot, channel_dim, **{name: given[name] for name in _PARTS})
    signs = sign(shifted(y, given.get("sign_shift"), channel_dim))
    return y.to(given.get("dtype") or torch.float32), signs


def _sign_pack(input: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    return sign(shifted(input, shift, dim)).float()


def _max_pool(words: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
              ceil_mode: bool) -> Tensor:
    most = F.max_pool2d(words.movedim(-1, 1), kernel_size, stride, padding, dilation, ceil_mode)
    return most.clamp(min=-1.0).movedim(1, -1)  # -inf where a window holds padding alone


def _conv_transpose(words: Tensor, weight_words: Tensor, channels: int, stride: Any, padding: Any,
                    output_padding: Any, groups: int, dilation: Any, *, scale: Tensor | None,
                    bias: Tensor | None, dtype: torch.dtype | None, **_: Any) -> Tensor:
    return _onnx.packed_conv_transpose2d(
        words.movedim(-1, 1), weight_words, channels, stride, padding, output_padding, groups,
        dilation, scale, bias, dtype or torch.float32)


_FORMS: dict[Any, Callable[..., Tensor]] = {
    ops.sign_pack.default: _sign_pack, ops.packed_max_pool2d.default: _max_pool,
    ops.packed_conv_transpose2d.default: _conv_transpose}
