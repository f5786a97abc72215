"""A residual binary block whose layers run as one differentiable operator in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitkernels import _onnx
from bitkernels._arguments import flag
from bitkernels._arguments import module as module_of
from bitkernels._dispatch import functional_transforms
from bitkernels._fx import FxLeaf, traced_whole
from bitkernels.nn.activations import RPReLU, RSign
from bitkernels.nn.conv import BinaryConv2d
from bitkernels.nn.hooks import is_patched
from bitkernels.nn.norm import SyncBatchNorm
from bitkernels.nn.packed import PackedConv2d
from bitkernels.nn.same import PackedSameConv2d, SameConv2d

_train = torch.ops.bitkernels.binary_residual_block.default
_pack = torch.ops.bitkernels.sign_pack.default
_infer = torch.ops.bitkernels.packed_conv2d.default

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global{hooks}") for hooks in (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))


class NoShortcut(nn.Module):
    """The shortcut of a `BinaryResidualBlock` that adds nothing: act(norm(conv(sign(x))))."""


class BinaryResidualBlock(FxLeaf):
    """act(norm(conv(sign(x))) + shortcut(x)), the block of Bi-Real Net, ReActNet and QuickNet.

    conv: a `BinaryConv2d`, best without bias (the norm cancels it).
    norm: `nn.BatchNorm2d`, `bitkernels.nn.SyncBatchNorm`, or `nn.SyncBatchNorm`, which works on
      CPUs too where it runs fused.
    sign: an `RSign`, for ReActNet; the convolution then takes input_quantizer=None.
    act: an `RPReLU` or `nn.PReLU`; None for no activation.
    shortcut: a module; None for x itself; `NoShortcut()` for none at all.
    relu: a ReLU between convolution and norm, as in QuickNet. The convolution's weight_scale is
      never negative, so that the ReLU sees the sign of the integer.
    input_grad_dtype: `torch.float8_e5m2`, or None. The gradient that goes through the convolution
      to the input is rounded to it, by an eighth of a value at most, and multiplied on the tensor
      cores on float8 of NVIDIA GPUs from sm_89 on; the weight's is not rounded. It needs gradients
      of 16 bits, as under autocast, and a GradScaler: what is beyond float16's range is infinite,
      what is below 2^-17 zero. What it does to training: docs/training.md.
    recompute: whether the fused backward computes the convolution's integers again. False keeps
      them, 2 bytes an element of the output (4 from 32768 products on): a convolution on bits less
      a step.

    Input (N, Cin, H, W), output (N, Cout, OH, OW) in the input's dtype, channels-last. The modules
    keep their names: parameters, buffers and state_dict keys are those of the same layers called
    one after the other, `sign.shift`, `conv.weight`, `norm.weight`, `act.slope`, ... Their options
    may be changed at any time.

    The fused operator (`torch.ops.bitkernels.binary_residual_block`) runs in training with batch
    statistics, and one fused convolution without gradients in evaluation, also after `pack`, which
    leaves a block with a `PackedConv2d`. The layers one after the other run wherever `unfused(x)`
    gives a reason: options or shapes that the operator does not cover, and hooks, which would not
    be called. Both compute the same values; the operator's rounds less often, and under autocast
    only the gradient of the convolution is in the autocast dtype. Set `fused = False` to always run
    the layers.

    Memory kept for the backward, per element, with recompute: one bit of the sign; the residual
    (which is the previous block's output) where there is an activation or a sign's estimator that
    needs |x|; else one bit of the straight-through mask.

    Raises ValueError for modules of other classes, and for another input_grad_dtype; RuntimeError
    where with input_grad_dtype layers would run one after the other in training.
    """

    conv: BinaryConv2d
    norm: Any
    sign: RSign | None
    act: Any
    shortcut: nn.Module | None
    recompute: bool = True  # of pickled blocks that are older than these
    input_grad_dtype: torch.dtype | None = None

    def __init__(self, conv: BinaryConv2d, norm: nn.Module, *, sign: RSign | None = None,
                 act: nn.Module | None = None, shortcut: nn.Module | None = None,
                 relu: bool = False, recompute: bool = True,
                 input_grad_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        parts: tuple[tuple[str, Any, tuple[type, ...]], ...] = (
                ("conv", conv, (BinaryConv2d,)), ("norm", norm, _NORMS),
                ("sign", sign, (RSign, type(None))), ("act", act, (RPReLU, nn.PReLU, type(None))))
        for name, module, classes in parts:
            if not isinstance(module, classes):
                known = " or ".join(dict.fromkeys(
                    c.__name__ for c in classes if c is not type(None)))
                raise ValueError(
                    f"BinaryResidualBlock: {name} must be {known}, got {type(module).__name__}")
        if input_grad_dtype not in (None, torch.float8_e5m2):
            raise ValueError("BinaryResidualBlock: input_grad_dtype must be torch.float8_e5m2 or "
                             f"None, got {input_grad_dtype!r}")
        if norm.num_features != conv.out_channels:
            raise ValueError(f"BinaryResidualBlock: norm must have {conv.out_channels} features as "
                             f"conv has output channels, got {norm.num_features}")
        self.sign, self.conv, self.norm, self.act = sign, conv, norm, act
        where = "BinaryResidualBlock"
        self.shortcut = None if shortcut is None else module_of(where, "shortcut", shortcut)
        self.relu = flag(where, "relu", relu)
        self.recompute, self.fused = flag(where, "recompute", recompute), True
        self.input_grad_dtype = input_grad_dtype

    def unfused(self, input: Tensor) -> str | None:
        """Why the layers run one after the other on this input, None if the operator runs."""
        conv, norm, act, sign = self.conv, self.norm, self.act, self.sign
        if not self.fused:
            return "fused is False"
        if _onnx.is_exporting():
            return "ONNX has no such operator"
        if any(_GLOBAL_HOOKS):
            return "all modules have hooks"
        for name, module in (("conv", conv), ("norm", norm), ("act", act), ("sign", sign)):
            if module is None:
                continue
            if (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                    or module._backward_pre_hooks):
                return f"{name} has hooks"
            if is_patched(module):
                return f"{name} has a forward of its own"
        packed = type(conv) in (PackedConv2d, PackedSameConv2d)
        if not packed and type(conv) not in (BinaryConv2d, SameConv2d):
            return f"conv is {type(conv).__name__}"
        if type(norm) not in _NORMS:
            return f"norm is {type(norm).__name__}"
        if act is not None and type(act) not in (RPReLU, nn.PReLU):
            return f"act is {type(act).__name__}"
        if sign is not None and type(sign) is not RSign:
            return f"sign is {type(sign).__name__}"
        reason = self._not_for_inference() if packed else self._quantizers()
        if reason is not None:
            return reason
        if conv.bias is not None or conv.padding_mode != "zeros":
            return "conv has a bias or a padding mode"
        if input.dim() != 4:
            return "the input is not a batch"
        if not norm.training and norm.running_mean is not None:
            # A graph made without gradients may be called with them.
            recorded = (torch.is_grad_enabled() or torch.compiler.is_exporting()
                        or torch.jit.is_tracing())
            if recorded and (self._trains(input) or functional_transforms()):
                return "gradients with running statistics"
            return "float64 with running statistics" if input.dtype == torch.float64 else None
        if self._group() is None and self._values_per_channel(input) < 2:
            return "less than two values per channel"
        return None

    def _quantizers(self) -> str | None:
        """What the operator does not know of the quantizers."""
        conv, sign = self.conv, self.sign
        options = conv.binarization
        if not conv.on_bits or options.input_first or options.weight_first:
            return "conv has quantizers that are not estimators of the operator"
        if sign is None:
            return None
        own, known = sign.operator_arguments(), options.estimators
        if known.get("input_estimator") != "identity":
            return "sign is an RSign before a convolution with input_quantizer=None only"
        if (own["estimator"] == known.get("weight_estimator") == "swish_sign"
                and own["beta"] != known.get("beta", 5.0)):
            return "sign and the weight quantizer have different betas"
        return None

    def _not_for_inference(self) -> str | None:
        """Why a block with a packed convolution is not one call."""
        if self.norm.training or self.norm.running_mean is None:
            return "conv is packed and norm takes batch statistics"
        return None if self.conv.input_quantizer is None else "conv has an input quantizer"

    @traced_whole
    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4 and input.shape[1] != self.conv.in_channels:
            raise RuntimeError(f"BinaryResidualBlock: input must be (N, {self.conv.in_channels}, "
                               f"H, W), got shape {tuple(input.shape)}")
        alone = type(self.shortcut) is NoShortcut
        residual = None if alone or self.shortcut is None else self.shortcut(input)
        added = None if alone else input if residual is None else residual
        if (self.unfused(input) is not None
                or (residual is not None and residual.dtype != input.dtype)):
            return self._layers(input, added)
        if not self.norm.training and self.norm.running_mean is not None:
            return self._fused_infer(input, added)
        if alone:  # one zero, that takes no memory until the backward
            residual = input.new_zeros(()).expand(
                input.shape[0], self.conv.out_channels, *self._size(input))
        return self._fused_train(input, residual)

    def _layers(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if (self.input_grad_dtype is not None and torch.is_grad_enabled()
                and not _onnx.is_exporting() and self._trains(input)):
            raise RuntimeError(
                f"BinaryResidualBlock: input_grad_dtype={self.input_grad_dtype} needs the fused "
                "operator, which does not run here: "
                f"{self.unfused(input) or 'the shortcut has another dtype'}")
        x = self.conv(input if self.sign is None else self.sign(input))
        if residual is not None and x.shape != residual.shape:
            raise RuntimeError(
                f"BinaryResidualBlock: shortcut must give {tuple(x.shape)} as the convolution, got "
                f"{tuple(residual.shape)}")
        y = self.norm(x.relu() if self.relu else x)
        y = y if residual is None else y + residual
        return y if self.act is None else self.act(y)

    def _fused_train(self, input: Tensor, residual: Tensor | None) -> Tensor:
        conv, norm, sign = self.conv, self.norm, self.sign
        conv.look_at_input(input, sign)
        options = conv.operator_arguments()
        if sign is not None:
            own = sign.operator_arguments()
            options.update(input_estimator=own["estimator"], input_clip=own["clip"])
            if own["estimator"] == "swish_sign":
                options["beta"] = own["beta"]
        shift_in, slope, shift_out = self._activation()
        out, mean, variance = _train(
            input, conv.weight_to_sign(), residual, None if sign is None else sign.shift,
            norm.weight, norm.bias, shift_in, slope, shift_out, conv.stride,
            conv.pads_of(input.shape[2:]), conv.dilation, conv.groups, relu=self.relu,
            eps=norm.eps, group=self._group(), recompute=self.recompute,
            input_grad_dtype=self.input_grad_dtype, **options)
        if norm.training and norm.track_running_stats:
            self._update_statistics(mean, variance)
        return out

    def _fused_infer(self, input: Tensor, residual: Tensor | None) -> Tensor:
        conv, norm = self.conv, self.norm
        wide = torch.promote_types(norm.running_var.dtype, torch.float32)
        factor = (norm.running_var.to(wide) + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        bias = -norm.running_mean * factor
        if norm.bias is not None:
            bias = bias + norm.bias
        if isinstance(conv, PackedConv2d):
            words, scale = conv.weight_image(), conv.scale
        else:
            # In every call: PyTorch does not count what a fused Adam, an average of weights written
            # through .data or a broadcast does to a latent weight, so nothing of it can be kept.
            words, scale = _pack(conv.weight_to_sign(), None, 1), conv.scale()
        shift_in, slope, shift_out = self._activation()
        return _infer(
            _pack(input, None if self.sign is None else self.sign.shift, 1),
            words, conv.in_channels, conv.stride, conv.pads_of(input.shape[2:]), conv.dilation,
            conv.groups, pad_value=conv.pad_value, out_channels=conv.out_channels,
            clamp_min=0.0 if self.relu else None,
            scale=factor if scale is None else factor * scale, bias=bias, residual=residual,
            shift_in=shift_in, slope=slope, shift_out=shift_out, dtype=input.dtype)

    def _activation(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        act = self.act
        if isinstance(act, RPReLU):
            return act.shift_in, act.slope, act.shift_out
        if act is None:
            return None, None, None
        return None, act.weight.expand(self.conv.out_channels), None

    def _group(self) -> str | None:
        """Name of the process group over which batch statistics are taken, None for this one."""
        if type(self.norm) is nn.BatchNorm2d or not self.norm.training:
            return None
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        group: Any = self.norm.process_group or torch.distributed.group.WORLD
        return group.group_name if torch.distributed.get_world_size(group) > 1 else None

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        if norm.running_mean is None:
            return
        running, momentum = [norm.running_mean, norm.running_var], norm.momentum
        batch = [t.to(like.dtype) for t, like in zip((mean, variance), running, strict=True)]
        if momentum is not None and not functional_transforms():
            torch._foreach_lerp_(running, batch, momentum)  # one launch on a GPU
            return
        for t, end in zip(running, batch, strict=True):
            if momentum is None:  # cumulative average
                t.lerp_(end, (1.0 / norm.num_batches_tracked).to(t.dtype))
            else:
                t.lerp_(end, momentum)

    def _trains(self, input: Tensor) -> bool:
        return input.requires_grad or any(p.requires_grad for p in self.parameters())

    def _size(self, input: Tensor) -> list[int]:
        """Of an image of the output."""
        conv, (top, bottom, left, right) = self.conv, self.conv.pads_of(input.shape[2:])
        return [(n + pad - d * (k - 1) - 1) // s + 1 for n, pad, d, k, s in zip(
            input.shape[2:], (top + bottom, left + right), conv.dilation, conv.kernel_size,
            conv.stride, strict=True)]

    def _values_per_channel(self, input: Tensor) -> int:
        height, width = self._size(input)
        return input.shape[0] * height * width

    def arguments(self) -> dict[str, Any]:
        """What its state does not say, for files of packed models."""
        return {"class": type(self).__name__, "relu": self.relu}

    def extra_repr(self) -> str:
        float8 = self.input_grad_dtype
        return ", ".join(["relu=True"] * self.relu + ["recompute=False"] * (not self.recompute)
                         + [f"input_grad_dtype={float8}"] * (float8 is not None))
