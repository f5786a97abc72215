"""Which kernel of this backend takes a call, decided from shapes and types, without Triton.

`decide` is what `dispatch.run` launches by and what `dispatch.explain` reports.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bitkernels.backends.triton import configs
from bitkernels.ops.geometry import conv_geometry, linear_geometry

VECTORS = ("scale", "bias", "shift_in", "slope", "shift_out", "sign_shift")
SMALL = 1 << 22  # words to compare (M * N * K / 32) below which one popc kernel does it all
PRODUCTS = ("packed_conv2d", "packed_conv2d_moments", "packed_linear")
SIGN_BACKWARD, ROWS, COLUMNS = "packed_conv2d_sign_backward", 128, 128  # and its tile


class Plan(NamedTuple):
    """inners: what to try, the preferred first: inner products, or None of an operator that has
    one kernel; empty where the reference runs. reason: why, in words. size: of a product."""

    inners: tuple[str | None, ...]
    reason: str
    size: configs.Size | None = None


_ONE_KERNEL = Plan((None,), "the operator's kernel")


def decide(op: str, args, kw, device: torch.device) -> Plan:
    """Of a call with checked arguments on a device that this backend runs on."""
    if not configs.enabled():
        return Plan((), "BITKERNELS_TRITON is 0")
    if op == SIGN_BACKWARD:
        reason = _no_tile(configs.family(device), *args[:5])
        return _ONE_KERNEL if reason is None else Plan((), reason)
    if not takes(op, args, kw):
        return Plan((), "the kernels do not take float64")
    if op not in PRODUCTS:
        return _ONE_KERNEL
    family = configs.family(device)
    if op == "packed_linear":
        return _linear(family, *args, **kw)
    return _conv2d(family, *args, **kw)


def takes(op: str, args, kw) -> bool:
    """Whether some kernel takes the call, on a device where one has run."""
    if op == SIGN_BACKWARD and _no_tile("", *args[:5]) is not None:
        return False
    return configs.enabled() and not _is_double(op, args, kw)


def _no_tile(family: str, grad, weight_words, channels, scale, input_size) -> str | None:
    """Why packed_conv2d_sign_backward does not take a gradient; family "": one where it ran."""
    if grad.element_size() == 1 and family in ("sm80", "sm86", "sm87", "hip"):
        return "this GPU has no tensor core on float8_e5m2 and float8_e4m3"
    outputs = grad.shape[1]
    if outputs == 0 or outputs % 16:
        return f"{outputs} output channels, no multiple of 16"
    signs = weight_words.shape[1:3].numel() * channels * outputs
    pixels = grad.shape[0] * (input_size[0] * input_size[1] + ROWS)
    if max(grad.numel(), signs, pixels * (channels + COLUMNS)) >= 2**31:
        return "an operand of 2^31 elements"
    return None


# Of operators of which not every tensor's type counts: the places of those that do. A residual
# block's vectors may be of any type, a shift and a scale too; between its passes all is float64.
_TYPED: dict[str, tuple[int, ...]] = {
    "residual_block_statistics": (), "residual_block_gradients": (), "residual_block_forward": (1,),
    "residual_block_backward": (0,), "residual_block_norm_backward": (0,),
    "residual_block_norm_backward_float8": (0,), "latent_weight_grad": (0,),
    "sign_backward": (0, 1, 3), SIGN_BACKWARD: ()}


def _is_double(op: str, args, kw) -> bool:
    """Whether arithmetic in float64 is asked for."""
    if op in PRODUCTS:
        found = [kw.get("dtype"), *(kw[n].dtype for n in (*VECTORS, "residual")
                                    if kw.get(n) is not None)]
        return torch.float64 in found
    if op == "unpack":
        return args[2] is torch.float64
    places = _TYPED.get(op)
    for t in args if places is None else [args[i] for i in places]:
        if isinstance(t, torch.Tensor) and t.dtype is torch.float64:
            return True
    return False


def _conv2d(family: str, words, weight_words, channels, stride=(1,), padding=(0,), dilation=(1,),
            groups=1, *, pad_value=0, out_channels=None, **kw) -> Plan:
    shape, *_ = conv_geometry("packed_conv2d", words, weight_words, channels, stride, padding,
                              dilation, groups, pad_value, out_channels)
    shape = torch.Size(shape)
    kh, kw_, depth = weight_words.shape[1:4]
    addressable = max(4 * words.numel(), 4 * weight_words.numel(), shape.numel()) < 2**31
    whole = groups == 1 or (channels // groups % 32 == 0
                            and shape[1] // groups % configs.COLUMNS == 0)
    flat = weight_words.shape[1] * weight_words.shape[2] * words.shape[1] * words.shape[2] == 1
    flat = flat and shape[2] * shape[3] == 1
    size = configs.Size(shape[0] * shape[2] * shape[3], shape[1], kh * kw_, depth, _writes(kw),
                        flat)
    return choose(family, size, whole, addressable)


def _writes(kw) -> str:
    if kw.get("residual") is not None:
        return "block"
    return "real" if kw.get("real", True) else "packed"


def _linear(family: str, words, weight_words, channels, *, out_channels=None, **kw) -> Plan:
    columns = linear_geometry("packed_linear", words, weight_words, channels, out_channels)[-1]
    width = words.shape[-1]
    rows = words.numel() // width
    addressable = max(4 * words.numel(), 4 * columns * width, rows * columns) < 2**31
    return choose(family, configs.Size(rows, columns, 1, width, _writes(kw), True), True,
                  addressable)


def choose(family: str, size: configs.Size, whole: bool, addressable: bool) -> Plan:
    """Inner products that take this contraction, the preferred first; popc takes everything.

    `whole`: one group, or groups of whole words in and whole tiles out.
    """
    forced = configs.forced_inner()
    fitting, reason = ["popc"], "groups that split words or tiles of channels"
    if not addressable:
        reason = "an operand of 2^31 bytes, which the tensor cores' kernels do not address"
    elif whole:
        fitting.insert(0, "int8")
        if not configs.has_b1(family):
            reason = "the tensor core on bytes: this GPU has no 1-bit one"
        elif size.taps > 31:
            reason = "the tensor core on bytes: the 1-bit kernel takes at most 31 taps"
        else:
            fitting.insert(0, "b1")
            reason = "the 1-bit tensor core"
    if forced in fitting:
        return Plan((forced,), "BITKERNELS_TRITON_INNER names it", size)
    if family == "interpret":
        return Plan(("popc",), "interpreted", size)
    if size.rows * size.columns * size.taps * size.words < SMALL:
        return Plan(("popc",), "few products: one launch, with nothing to prepare", size)
    if forced is not None:
        reason += f"; BITKERNELS_TRITON_INNER={forced} does not take this call"
    return Plan(tuple(fitting), reason, size)
