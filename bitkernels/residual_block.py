"""The residual binary block as one differentiable operator, in training mode.

    dot    = binary convolution of sign(input + sign_shift) with sign(weight)
    value  = batch norm of scale * dot (of its positive part with relu) + residual
    output = value > -shift_in ? value + shift_in : slope (value + shift_in), plus shift_out

The convolution is written once, as int16, while its integer sums and sums of squares are taken: the
statistics of the batch are exact. One more pass normalizes, adds and activates. For the backward it
keeps the packed signs, the residual where there is an activation (the residual stream, which a
chain of blocks shares), and what the sign's estimator needs: the input itself, or one bit an
element. The dot products are computed again from the bits, and everything else from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitkernels._block_checks import check_binary_residual_block
from bitkernels._conv2d_backward import conv2d_backward
from bitkernels._dispatch import (
    FirstOrder,
    autocast,
    below_autograd,
    in_memory_format,
    is_recorded,
    is_traced,
    record,
    unrecorded,
)
from bitkernels._ops import LIB
from bitkernels.autograd import finish_weight_grad, memory_format

ops = torch.ops.bitkernels


def _all_reduce(t: Tensor, group: str | None) -> Tensor:
    """The sum of `t` over the processes of a group, given by name."""
    if group is None:
        return t
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(t, "sum", group))


class _Norm:
    """Batch statistics of scale * dot and the affine function of dot that they make."""

    def __init__(self, moments: Tensor, scale, weight, bias, eps: float,
                 group: str | None) -> None:
        sums = _all_reduce(moments.double(), group)
        self.count = total = sums[2]
        self.center = sums[0] / total  # mean of dot
        variance = (sums[1] / total - self.center * self.center).clamp_min(0)
        self.mean = self.center
        if scale is not None:
            alpha = scale.double()
            self.mean, variance = self.mean * alpha, variance * alpha * alpha
        inverse = (variance + eps).rsqrt()
        self.factor = inverse if weight is None else inverse * weight.double()  # of scale * dot
        # of dot - center, to give the normalized value
        self.normal = inverse if scale is None else inverse * alpha
        self.slope = self.factor if scale is None else self.factor * alpha  # of dot
        self.offset = -self.slope * self.center
        if bias is not None:
            self.offset = self.offset + bias.double()
        self.variance = variance * (total / (total - 1).clamp_min(1))  # unbiased


def _moments(words: Tensor, weight_words: Tensor, channels: int, conf) -> tuple[Tensor, Tensor]:
    return ops.packed_conv2d_moments.default(
        words, weight_words, channels, conf["stride"], conf["pad"], conf["dilation"],
        conf["groups"], pad_value=conf["pad_value"], relu=conf["relu"])


def _forward(input, weight, residual, sign_shift, norm_weight, norm_bias, shift_in, slope,
             shift_out, scale, conf, clip):
    """(output, packed signs, packed mask or None, statistics)."""
    mask, weight_words = None, ops.sign_pack.default(weight, None, 1)
    if clip is None:
        words = ops.sign_pack.default(input, sign_shift, 1)
    else:
        words, mask = ops.sign_pack_mask.default(input, clip, sign_shift, 1)
    dot, moments = _moments(words, weight_words, input.shape[1], conf)
    norm = _Norm(moments, scale, norm_weight, norm_bias, conf["eps"], conf["group"])
    out = ops.residual_block_forward.default(
        dot, input if residual is None else residual, norm.slope, norm.offset, shift_in, slope,
        shift_out, conf["relu"])
    return out, words, mask, norm


class _ResidualBlock(FirstOrder):
    operator = "binary_residual_block"

    @staticmethod
    def call(*args):
        *tensors, scale, conf = args
        options = dict(conf)
        geometry = [options.pop(name) for name in ("stride", "pad", "dilation", "groups")]
        return ops.binary_residual_block.default(*tensors, *geometry, scale=scale, **options)

    @staticmethod
    def forward(ctx, input, weight, residual, sign_shift, norm_weight, norm_bias, shift_in, slope,
                shift_out, scale, conf):
        estimator = conf["input_estimator"]
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
            estimator = "none"
        if estimator == "ste_sign" and conf["input_clip"] is None:
            estimator = "identity"
        # The stream is kept for the activation; where it is the input, no mask is needed.
        stream = None if slope is None else input if residual is None else residual
        from_input = estimator in ("approx_sign", "swish_sign") or stream is input
        clip = conf["input_clip"] if estimator == "ste_sign" and not from_input else None
        with below_autograd():
            out, words, mask, norm = _forward(
                input, weight, residual, sign_shift, norm_weight, norm_bias, shift_in, slope,
                shift_out, scale, conf, clip)
        kept = input if from_input and estimator not in ("identity", "none") else None
        ctx.save_for_backward(words, weight, scale, stream, kept, mask, sign_shift,
                              shift_in, slope, norm.slope, norm.offset, norm.center, norm.factor,
                              norm.normal, norm.count)
        ctx.conf, ctx.estimator = conf, estimator
        ctx.input_dtype, ctx.memory_format = input.dtype, memory_format(input)
        ctx.residual_format = None if residual is None else memory_format(residual)
        ctx.dtypes = [None if t is None else t.dtype for t in
                      (sign_shift, norm_weight, norm_bias, shift_in, slope, shift_out)]
        mean, variance = norm.mean, norm.variance
        if input.dtype != torch.float64:
            mean, variance = mean.float(), variance.float()
        else:  # outputs of a Function must not alias what it keeps
            mean = mean.clone()
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx, grad, _mean, _variance):
        (words, weight, scale, stream, kept, mask, sign_shift, shift_in, slope,
         norm_slope, offset, center, factor, normal, count) = ctx.saved_tensors
        conf, needs, estimator = ctx.conf, ctx.needs_input_grad, ctx.estimator
        weight_words = ops.sign_pack.default(weight, None, 1)
        dot, _ = _moments(words, weight_words, weight.shape[1] * conf["groups"], conf)
        grad_value, sums = ops.residual_block_backward.default(
            grad, dot, stream, norm_slope, offset, shift_in, slope, center, conf["relu"])
        if slope is None:
            grad_value = grad
        grads = [None] * 11
        for at, value in ((4, sums[1] * normal), (5, sums[0]), (6, sums[0]), (7, sums[2]),
                          (8, sums[3])):
            if needs[at]:
                grads[at] = value.to(ctx.dtypes[at - 3])

        wants_input = estimator != "none" and (needs[0] or needs[3])
        wants_scale = scale is not None and needs[9]
        wants_weight = (needs[1] and conf["weight_estimator"] != "none") or wants_scale
        if wants_input or wants_weight:
            total = _all_reduce(sums[:2].contiguous(), conf["group"]) / count
            dtype = conf["dtype"] or grad.dtype
            if (scale is not None and conf["scale_weight_grad"] and not wants_scale
                    and dtype != torch.float16):  # which it might bring below the normal numbers
                factor, scale = factor * scale.double(), None  # where it costs no pass
            grad_dot = ops.residual_block_norm_backward.default(
                grad_value, dot, factor, -factor * normal * normal * total[1],
                -factor * total[0], center, conf["relu"], dtype)
            grad_signs, grad_weight_signs = conv2d_backward(
                grad_dot, words, weight, weight_words, scale, conf, wants_input, wants_weight)
            if wants_weight:
                grads[1], grads[9] = finish_weight_grad(
                    grad_weight_signs, weight, weight_words, scale, conf, needs[1],
                    wants_scale)
        # Without a residual the input is that too.
        own = grad_value if ctx.residual_format is None else None
        if wants_input:
            grads[0], grads[3] = _sign_backward(ctx, grad_signs, kept, mask, sign_shift, own)
        elif needs[0]:
            grads[0] = None if own is None else in_memory_format(own, ctx.memory_format)
        if needs[2]:
            grads[2] = in_memory_format(grad_value, ctx.residual_format)
        return tuple(grads)


def _sign_backward(ctx, grad, kept, mask, shift, add) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input, with `add`, and of the shift."""
    conf, dtype = ctx.conf, ctx.input_dtype
    if kept is not None:
        out, total = ops.sign_backward.default(
            grad, kept, shift, add, estimator=ctx.estimator, clip=conf["input_clip"],
            beta=conf["beta"])
    else:
        grad = in_memory_format(grad.to(dtype), ctx.memory_format)
        if mask is not None:
            grad = ops.mask_grad.default(grad, mask, 1)
        total = grad.sum((0, 2, 3), dtype=torch.float64) if ctx.needs_input_grad[3] else None
        out = grad if add is None else grad + add
    return out, total.to(shift.dtype) if ctx.needs_input_grad[3] else None


def _binary_residual_block(
        input, weight, residual=None, sign_shift=None, norm_weight=None, norm_bias=None,
        shift_in=None, slope=None, shift_out=None, stride=(1,), padding=(0,), dilation=(1,),
        groups=1, *, pad_value=0, relu=False, eps=1e-5, group=None, scale=None,
        input_estimator="ste_sign", input_clip=1.0, weight_estimator="ste_sign", weight_clip=1.0,
        beta=5.0, scale_weight_grad=True, dtype=None):
    shape, stride, pad, dilation = check_binary_residual_block(
        input, weight, residual, sign_shift, norm_weight, norm_bias, shift_in, slope, shift_out,
        stride, padding, dilation, groups, pad_value=pad_value, relu=relu, eps=eps, group=group,
        scale=scale, input_estimator=input_estimator, input_clip=input_clip,
        weight_estimator=weight_estimator, weight_clip=weight_clip, beta=beta,
        scale_weight_grad=scale_weight_grad, dtype=dtype)
    conf = dict(stride=stride, pad=pad, dilation=dilation, groups=groups, pad_value=pad_value,
                relu=relu, eps=eps, group=group, input_estimator=input_estimator,
                input_clip=input_clip, weight_estimator=weight_estimator, weight_clip=weight_clip,
                beta=beta, scale_weight_grad=scale_weight_grad, dtype=dtype)
    tensors = (input, weight, residual, sign_shift, norm_weight, norm_bias, shift_in, slope,
               shift_out, scale)
    if is_recorded("binary_residual_block", *tensors):
        return record(_ResidualBlock, tensors, conf)
    if is_traced():
        return unrecorded(_ResidualBlock, tensors, conf)
    with below_autograd():
        out, *_, norm = _forward(*tensors, conf, None)
    if input.dtype == torch.float64:
        return out, norm.mean, norm.variance
    return out, norm.mean.float(), norm.variance.float()


for _key in ("Autograd", "CompositeExplicitAutograd"):
    LIB.impl("binary_residual_block", _binary_residual_block, _key)
for _device in ("cpu", "cuda"):
    LIB.impl("binary_residual_block", autocast(ops.binary_residual_block.default, _device),
             f"Autocast{_device.upper()}")
