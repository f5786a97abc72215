"""binary_residual_block: a residual block in training as one differentiable operator.

    dot    = binary convolution of sign(input + sign_shift) with sign(weight)
    value  = batch norm of scale * dot (of its positive part with relu) + residual
    output = value > -shift_in ? value + shift_in : slope (value + shift_in), plus shift_out

The convolution is written once, as int16, while its integer sums and sums of squares are taken: the
statistics of the batch are exact. One more pass normalizes, adds and activates. For the backward it
keeps the packed signs, the residual where there is an activation (the residual stream, which a
chain of blocks shares), and what the sign's estimator needs: the input itself, or one bit an
element. The dot products are computed again from the bits, unless asked to be kept, and everything
else from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitkernels._dispatch import FirstOrder, below_autograd, differentiate, in_memory_format
from bitkernels.ops import _training as training
from bitkernels.ops._checks import (
    HALVES,
    check_real,
    check_same_device,
    check_vectors,
    describe,
    fail,
)
from bitkernels.ops._conv2d_backward import conv2d_backward, in_one_pass
from bitkernels.ops._record import Call, Operator, Sample, define, each, inside, remembered, traced
from bitkernels.ops.binary_conv2d import check_conv
from bitkernels.ops.geometry import ConvSpec, empty_real
from bitkernels.ops.packed_conv2d_moments import dot_dtype
from bitkernels.ops.residual_block_float8 import FLOAT8
from bitkernels.ops.residual_block_vectors import Statistics, gradients, statistics

ops = torch.ops.bitkernels


class PerTensor(NamedTuple):
    """The operator's tensors, or something of each: its gradient, whether it needs one."""

    input: Any
    weight: Any
    residual: Any = None
    sign_shift: Any = None
    norm_weight: Any = None
    norm_bias: Any = None
    shift_in: Any = None
    slope: Any = None
    shift_out: Any = None
    scale: Any = None


# Those whose gradients are sums over the batch, in the order of residual_block_gradients.
VECTORS = ("norm_weight", "norm_bias", "shift_in", "slope", "shift_out")


class BlockSpec(NamedTuple):
    """What stands between convolution and residual, whether the backward computes the dot products
    again, and in what it goes through the convolution to the input, if not in `dtype`."""

    relu: bool
    eps: float
    group: str | None
    recompute: bool
    input_grad_dtype: torch.dtype | None


def check(input, weight, residual=None, sign_shift=None, norm_weight=None, norm_bias=None,
          shift_in=None, slope=None, shift_out=None, stride=(1,), padding=(0,), dilation=(1,),
          groups=1, *, pad_value=0, relu=False, eps=1e-5, group=None, recompute=True,
          input_grad_dtype=None, scale=None, **estimators):
    op = "binary_residual_block"
    check_real(op, "input", input, 4)
    conv, train = check_conv(op, input, weight, None, scale, stride, padding, dilation, groups,
                             pad_value, estimators)
    check_same_device(op, input, residual=residual)
    shape = _output_shape(input, weight, conv)
    stream = input if residual is None else residual
    if stream.shape != shape or stream.dtype != input.dtype:
        fail(op, "residual", f"{str(input.dtype)[6:]} of shape {tuple(shape)}", describe(stream))
    if group is None and shape[0] * shape[2] * shape[3] < 2:
        fail(op, "input", "of more than 1 value per channel in the output", describe(input))
    check_vectors(op, input, shape[1], norm_weight=norm_weight, norm_bias=norm_bias,
                  shift_in=shift_in, slope=slope, shift_out=shift_out)
    check_vectors(op, input, input.shape[1], sign_shift=sign_shift)
    if slope is None and (shift_in is not None or shift_out is not None):
        fail(op, "slope", "given with shift_in or shift_out", "None")
    if not eps >= 0:
        fail(op, "eps", "at least 0", f"{eps:g}")
    if group is not None and not _is_group(group):
        fail(op, "group", "the name of a process group, or None", repr(group))
    if train.dtype is not None and (train.dtype == torch.float64) != (input.dtype == torch.float64):
        fail(op, "dtype", "a real type, float64 for float64 only", train.dtype)
    if input_grad_dtype not in (None, FLOAT8):
        fail(op, "input_grad_dtype", "float8_e5m2 or None", input_grad_dtype)
    if input_grad_dtype is not None and (train.dtype or input.dtype) not in HALVES:
        fail(op, "dtype", "float16 or bfloat16, or the input, with input_grad_dtype",
             train.dtype or input.dtype)
    tensors = PerTensor(input, weight, residual, sign_shift, norm_weight, norm_bias, shift_in,
                        slope, shift_out, scale)
    spec = BlockSpec(relu, eps, group, recompute, input_grad_dtype)
    return Call((*tensors, conv, spec, train))


def _output_shape(input: Tensor, weight: Tensor, conv: ConvSpec) -> tuple[int, ...]:
    size = conv.output_size(input.shape[-2:], weight.shape[2:])
    return (input.shape[0], weight.shape[0], *size)


def fake(input, weight, *rest):
    shape = _output_shape(input, weight, rest[-3])
    vector = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (empty_real(input, shape, input.dtype, True),
            *(input.new_empty(shape[1], dtype=vector) for _ in range(2)))


def _is_group(name: str) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed import distributed_c10d

    try:
        distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError):  # torch's words for an unknown name
        return False
    return True


def _all_reduce(t: Tensor, group: str) -> Tensor:
    """The sum of `t` over the processes of a group, given by name."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(t, "sum", group))


def _moments(run: Any, words: Tensor, weight_words: Tensor, channels: int, conv: ConvSpec,
             relu: bool, sums: bool) -> tuple[Tensor, Tensor]:
    return run(
        "packed_conv2d_moments", words, weight_words, channels, conv.stride, conv.pad,
        conv.dilation, conv.groups, pad_value=conv.pad_value, out_channels=None, relu=relu,
        dtype=dot_dtype(weight_words, channels, conv.groups), sums=sums)


def _dots_again(run: Any, grad: Tensor, words: Tensor, weight_words: Tensor, channels: int,
                conv: ConvSpec, relu: bool) -> Tensor:
    if traced(run):
        return ops.packed_conv2d_recompute.default(
            grad, words, weight_words, channels, conv.stride, conv.pad, conv.dilation, conv.groups,
            pad_value=conv.pad_value)
    return _moments(run, words, weight_words, channels, conv, relu, False)[0]


def _forward(t: PerTensor, conv: ConvSpec, spec: BlockSpec, clip: float | None):
    """(output, mean, variance, what the backward needs of the norm, packed signs of input and
    weight, packed mask or None, dot products or None)."""
    run = inside(t.input)
    if spec.group is None:
        return remembered(run, _passes, *t, conv, spec, clip)
    return _passes(run, *t, conv, spec, clip)


def _passes(run: Any, *args: Any):
    *tensors, conv, spec, clip = args
    t = PerTensor(*tensors)
    mask, weight_words = None, run("sign_pack", t.weight, None, 1)
    if clip is None:
        words = run("sign_pack", t.input, t.sign_shift, 1)
    else:
        words, mask = run("sign_pack_mask", t.input, clip, t.sign_shift, 1)
    dot, moments = _moments(run, words, weight_words, t.input.shape[1], conv, spec.relu, True)
    if spec.group is not None:
        moments = _all_reduce(moments.double(), spec.group)
    vectors, mean, variance = statistics(
        run, moments, t.scale, t.norm_weight, t.norm_bias, spec.eps,
        torch.float64 if t.input.dtype == torch.float64 else torch.float32)
    norm = Statistics(*vectors.unbind(0))
    out = run("residual_block_forward", dot, t.input if t.residual is None else t.residual,
              norm.slope, norm.offset, t.shift_in, t.slope, t.shift_out, spec.relu)
    return (out, mean, variance, vectors, words, weight_words, mask,
            None if spec.recompute else dot)


class _ResidualBlock(FirstOrder):
    operator = "binary_residual_block"

    @staticmethod
    def call(*args):
        *tensors, scale, conv, spec, train = args
        return ops.binary_residual_block.default(
            *tensors, conv.stride, conv.pad, conv.dilation, conv.groups, pad_value=conv.pad_value,
            scale=scale, **spec._asdict(), **train.keywords())

    @staticmethod
    def below(*args):
        *tensors, conv, spec, _ = args
        return _forward(PerTensor(*tensors), conv, spec, None)[:3]

    @staticmethod
    def forward(ctx, *args):
        *tensors, conv, spec, train = args
        t, needs = PerTensor(*tensors), PerTensor(*ctx.needs_input_grad[:len(tensors)])
        estimator = train.of_input(needs.input or needs.sign_shift)
        if estimator == "ste_sign" and train.input_clip is None:
            estimator = "identity"
        # The stream is kept for the activation; where it is the input, no mask is needed.
        stream = None if t.slope is None else t.input if t.residual is None else t.residual
        from_input = estimator in ("approx_sign", "swish_sign") or stream is t.input
        clip = train.input_clip if estimator == "ste_sign" and not from_input else None
        with below_autograd():
            out, mean, variance, vectors, words, weight_words, mask, dot = _forward(
                t, conv, spec, clip)
        kept = t.input if from_input and estimator not in ("identity", "none") else None
        ctx.save_for_backward(words, weight_words, t.weight, t.scale, stream, kept, mask,
                              t.sign_shift, t.shift_in, t.slope, vectors, dot)
        ctx.conv, ctx.spec, ctx.train, ctx.estimator = conv, spec, train, estimator
        ctx.input_dtype, ctx.memory_format = t.input.dtype, training.memory_format(t.input)
        ctx.residual_format = None if t.residual is None else training.memory_format(t.residual)
        ctx.dtypes = PerTensor(*(None if x is None else x.dtype for x in t))
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # zeros for these two
        return out, mean, variance

    @staticmethod
    def backward(ctx, tensors, grad, _mean, _variance):
        (words, weight_words, weight, scale, stream, kept, mask, sign_shift, shift_in, slope,
         vectors, dot) = tensors
        conv, spec, train, estimator = ctx.conv, ctx.spec, ctx.train, ctx.estimator
        needs = PerTensor(*ctx.needs_input_grad[:len(PerTensor._fields)])
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        run = inside(grad)
        wants_input = estimator != "none" and (needs.input or needs.sign_shift)
        wants_scale = scale is not None and needs.scale
        wants_weight = (needs.weight and train.weight_estimator != "none") or wants_scale
        dtype, factor = train.dtype or grad.dtype, None
        if (scale is not None and train.scale_weight_grad and not wants_scale
                and dtype != torch.float16):  # which it might bring below the normal numbers
            factor, scale = scale, None  # where it costs no pass
        dtypes = {getattr(ctx.dtypes, name) for name in VECTORS if getattr(needs, name)}
        args = (grad, words, weight_words, dot, stream, shift_in, slope, vectors, factor,
                weight.shape[1] * conv.groups, conv, spec, wants_input or wants_weight, dtype,
                dtypes.pop() if len(dtypes) == 1 else torch.float64,
                None if spec.input_grad_dtype is None else scale)
        if spec.group is None:
            grad_value, grad_dot, rounded, *found = remembered(run, _passes_backward, *args)
        else:
            grad_value, grad_dot, rounded, *found = _passes_backward(run, *args)
        grads = PerTensor(None, None, **{
            name: t.to(getattr(ctx.dtypes, name)) for name, t in zip(VECTORS, found, strict=True)
            if getattr(needs, name)})
        # Without a residual the input is that too.
        own = grad_value if ctx.residual_format is None else None
        in_one = wants_input and in_one_pass(grad_dot, rounded, conv)
        if wants_input or wants_weight:
            grad_signs, grad_weight_signs = conv2d_backward(
                grad_dot, words, weight, weight_words, scale, conv,
                wants_input and rounded is None and not in_one, wants_weight)
            if wants_weight:
                of_weight, of_scale = training.finish_weight_grad(
                    grad_weight_signs, weight, weight_words, scale, train, needs.weight,
                    wants_scale)
                grads = grads._replace(weight=of_weight, scale=of_scale)
        if rounded is not None:  # with the scale in it
            grad_dot, scale = rounded, None
        if in_one:
            of_input, of_shift = _sign_backward_in_one(
                ctx, grad_dot, weight_words, weight.shape[1], scale, words.shape[1:3], kept, mask,
                sign_shift, own, dtype)
        elif wants_input:
            if rounded is not None:
                grad_signs, _ = conv2d_backward(grad_dot.to(dtype), words, weight, weight_words,
                                                None, conv, True, False)
            del grad_dot, rounded  # as large as the input
            of_input, of_shift = _sign_backward(ctx, grad_signs, kept, mask, sign_shift, own)
        if wants_input:
            grads = grads._replace(input=of_input, sign_shift=of_shift)
        elif needs.input and own is not None:
            grads = grads._replace(input=in_memory_format(own, ctx.memory_format))
        if needs.residual:
            grads = grads._replace(residual=in_memory_format(grad_value, ctx.residual_format))
        return (*grads, None, None, None)


def _passes_backward(run, grad, words, weight_words, dot, stream, shift_in, slope, vectors,
                     factor, channels: int, conv: ConvSpec, spec: BlockSpec, wants_dot: bool,
                     dtype: torch.dtype, vector_dtype: torch.dtype, scale):
    """(the value's gradient, that of the dot products or None, that times scale in float8 or None,
    those of the vectors)."""
    norm = Statistics(*vectors.unbind(0))
    if dot is None:
        dot = _dots_again(run, grad, words, weight_words, channels, conv, spec.relu)
    grad_value, sums = run("residual_block_backward", grad, dot, stream, norm.slope, norm.offset,
                           shift_in, slope, norm.center, spec.relu)
    if slope is None:
        grad_value = grad
    total = grad_dot = rounded = None
    if spec.group is not None and wants_dot:
        total = _all_reduce(sums[:2].contiguous(), spec.group)
    pqr, *found = gradients(run, sums, total, vectors, factor, vector_dtype)
    if wants_dot and spec.input_grad_dtype is not None:
        grad_dot, rounded = run("residual_block_norm_backward_float8", grad_value, dot,
                                *pqr.unbind(0), norm.center, scale, spec.relu, dtype)
    elif wants_dot:
        grad_dot = run("residual_block_norm_backward", grad_value, dot, *pqr.unbind(0),
                       norm.center, spec.relu, dtype)
    return grad_value, grad_dot, rounded, *found


def _sign_backward(ctx, grad, kept, mask, shift, add) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input, with `add`, and of the shift."""
    wants_shift = PerTensor(*ctx.needs_input_grad[:len(PerTensor._fields)]).sign_shift
    if kept is not None:
        out, total = inside(grad)("sign_backward", grad, kept, shift, add, ctx.estimator,
                                  ctx.train.input_clip, ctx.train.beta,
                                  shift.dtype if wants_shift else torch.float64)
    else:
        grad = in_memory_format(grad.to(ctx.input_dtype), ctx.memory_format)
        if mask is not None:
            grad = inside(grad)("mask_grad", grad, mask, 1)
        total = grad.sum((0, 2, 3), dtype=torch.float64) if wants_shift else None
        out = grad if add is None else grad + add
    return out, total.to(shift.dtype) if wants_shift else None


def _sign_backward_in_one(ctx, grad, weight_words, channels: int, scale, size, kept, mask, shift,
                          add, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`_sign_backward` of what is also to go through the convolution."""
    operands, slope = (None, None, None), ("identity", None, 1.0)
    if kept is not None:
        operands = kept, shift, add
        slope = ctx.estimator, ctx.train.input_clip, ctx.train.beta
    out, total = inside(grad)("packed_conv2d_sign_backward", grad, weight_words, channels, scale,
                              size, *operands, ctx.conv.pad, ctx.conv.dilation, dtype, *slope)
    if kept is None:
        return _sign_backward(ctx, out, None, mask, shift, add)
    wants_shift = PerTensor(*ctx.needs_input_grad[:len(PerTensor._fields)]).sign_shift
    return (in_memory_format(out, ctx.memory_format),
            total.to(shift.dtype) if wants_shift else None)


def autograd(*args, **kw):
    *tensors, conv, spec, train = check(*args, **kw).args
    return differentiate(_ResidualBlock, tuple(tensors), conv, spec, train)


def samples(v):
    x, vectors = v.leaf(2, 19, 5, 6), [v.leaf(19) for _ in range(5)]
    wide = dict(dtype=torch.float64)
    return [
        Sample((x, v.leaf(19, 19, 3, 3), None, None, *vectors, (1,), (1,))),
        Sample((v.leaf(2, 37, 5, 6, **wide), v.leaf(19, 37, 3, 3, **wide),
                v.leaf(2, 19, 2, 7, **wide), v.leaf(37), None, None, None, None, None,
                (2, 1), (1, 0, 2, 1), (1, 1), 1),
               dict(relu=True, scale=v.real(19).abs().requires_grad_()))]


define(Operator(
    # It returns the activation, and the mean and unbiased variance for running statistics.
    schemas=("binary_residual_block(Tensor input, Tensor weight, Tensor? residual=None, "
             "Tensor? sign_shift=None, Tensor? norm_weight=None, Tensor? norm_bias=None, "
             "Tensor? shift_in=None, Tensor? slope=None, Tensor? shift_out=None, "
             "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, *, "
             "int pad_value=0, bool relu=False, float eps=1e-05, str? group=None, "
             "bool recompute=True, ScalarType? input_grad_dtype=None, "
             f"{training.SCHEMA}) -> (Tensor, Tensor, Tensor)",),
    group="The residual block", check=check, fake=fake, autograd=autograd, samples=samples,
    batched=each, engine=False,
    text="""
A residual block in training, as one differentiable operator: sign(input + sign_shift), binary
convolution, ReLU, batch norm with the batch's statistics, plus residual, (RP)PReLU; all but
convolution, norm and residual optional. bitkernels.nn.BinaryResidualBlock calls it.

Arguments:
  input: real (N, Cin, H, W).
  weight: real (Cout, Cin / groups, kh, kw), the latent weights.
  residual: real (N, Cout, OH, OW), the input's dtype; None: the input.
  sign_shift: (Cin,) real; None: none.
  norm_weight: (Cout,) real, the norm's factor; None: 1.
  norm_bias: (Cout,) real, the norm's shift; None: 0.
  shift_in: (Cout,) real, of the activation; it needs slope.
  slope: (Cout,) real; None: no activation.
  shift_out: (Cout,) real; it needs slope.
  stride: as of packed_conv2d.
  padding: as of packed_conv2d.
  dilation: as of packed_conv2d.
  groups: as of packed_conv2d.
  pad_value: as of packed_conv2d.
  relu: a ReLU between convolution and norm.
  eps: of the norm, at least 0.
  group: the name of a process group whose batches are normalized together; None: this process.
  recompute: compute the dot products again in the backward; False: keep them, 2 or 4 bytes an
    element of the output.
  input_grad_dtype: float8_e5m2: the gradient is rounded to it on the way through the convolution
    to the input, not to the weight; None: it is not. Beside gradients of 16 bits.
  scale: (Cout,) real, a factor of the weight; None: none.
  input_estimator: as of binary_conv2d.
  input_clip: as of binary_conv2d.
  weight_estimator: as of binary_conv2d.
  weight_clip: as of binary_conv2d.
  beta: as of binary_conv2d.
  scale_weight_grad: as of binary_conv2d.
  dtype: of the gradient that enters the convolution's backward; None: the input's.
Returns:
  (output (N, Cout, OH, OW) in the input's dtype, channels-last; mean and unbiased variance of the
  batch, (Cout,), for running statistics).
Errors:
  those of binary_conv2d; a residual of another shape or dtype, fewer than two values a channel,
  shift_in or shift_out without slope, an eps below 0.
Example:
  >>> x, weight = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(16, 16, 3, 3)
  >>> y, mean, variance = ops.binary_residual_block(x, weight, padding=1)
  >>> y.sum().backward()
  >>> y.shape, mean.shape, x.grad.shape
  (torch.Size([2, 16, 8, 8]), torch.Size([16]), torch.Size([2, 16, 8, 8]))
"""))
