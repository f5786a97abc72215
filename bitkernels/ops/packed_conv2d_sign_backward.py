"""packed_conv2d_sign_backward: through a binary convolution and the sign before it, in one pass."""

from __future__ import annotations

import torch

from bitkernels.ops._checks import (
    HALVES,
    check_channel_vector,
    check_same_device,
    describe,
    fail,
)
from bitkernels.ops._contract import as_rows
from bitkernels.ops._record import Call, Operator, Sample, channels_last, define, each
from bitkernels.ops.geometry import check_words, conv_output_size, empty_real, padding4, pair
from bitkernels.ops.packed_conv2d_grads import reference_input
from bitkernels.ops.residual_block_float8 import FLOAT8, check_half
from bitkernels.ops.sign_backward import check as check_sign_backward
from bitkernels.ops.sign_backward import reference as sign_backward


def check(grad, weight_words, channels, scale, input_size, input=None, shift=None, add=None,
          padding=(0,), dilation=(1,), *, dtype, estimator="identity", clip=1.0, beta=5.0):
    op = "packed_conv2d_sign_backward"
    check_words(op, "weight_words", weight_words, channels, 4)
    outputs = weight_words.shape[0]
    check_half(op, dtype)
    if grad.dtype not in (dtype, FLOAT8) or grad.dim() != 4 or grad.shape[1] != outputs:
        fail(op, "grad", f"{str(dtype)[6:]} or float8_e5m2 of shape (N, {outputs}, OH, OW)",
             describe(grad))
    check_same_device(op, grad, weight_words=weight_words, scale=scale, input=input)
    check_channel_vector(op, "scale", scale, outputs)
    if scale is not None and grad.dtype == FLOAT8:
        fail(op, "scale", "None for a grad in float8", describe(scale))
    input_size = pair(op, "input_size", input_size, 1)
    dilation, pad = pair(op, "dilation", dilation, 1), padding4(op, padding)
    size = conv_output_size(op, input_size, weight_words.shape[1:3], (1, 1), pad, dilation)
    if grad.shape[2:] != size:
        fail(op, "grad", f"of shape {(*grad.shape[:2], *size)}", describe(grad))
    if input is None:
        for arg, t in (("shift", shift), ("add", add)):
            if t is not None:
                fail(op, arg, "None without an input", describe(t))
        if estimator != "identity":
            fail(op, "estimator", "identity without an input", repr(estimator))
    else:
        shape = (grad.shape[0], channels, *input_size)
        if input.shape != shape or input.dtype not in (torch.float32, *HALVES):
            fail(op, "input", f"float32, float16 or bfloat16 of shape {shape}", describe(input))
        check_sign_backward(input, input, shift, add, estimator=estimator, clip=clip, beta=beta)
    return Call((grad, weight_words, channels, scale, input_size, input, shift, add, pad, dilation,
                 dtype, estimator, clip, beta))


def fake(grad, weight_words, channels, scale, input_size, input, shift, add, pad, dilation, dtype,
         *estimator):
    shape = (grad.shape[0], channels, *input_size)
    sums = grad.new_empty(0 if input is None else channels, dtype=torch.float64)
    return empty_real(grad, shape, dtype if input is None else input.dtype, True), sums


def reference(grad, weight_words, channels, scale, input_size, input, shift, add, pad, dilation,
              dtype, estimator, clip, beta):
    """packed_conv2d_input_grad; with an input sign_backward of that. Rounded at the end."""
    wide = dtype if grad.is_cuda else torch.float32  # in which the library is fast
    if scale is not None:
        scale = scale.to(dtype)
    product = reference_input(grad.to(wide), weight_words, channels, scale, input_size, pad,
                              dilation)
    if input is None:
        return product.to(dtype), grad.new_empty(0, dtype=torch.float64)
    out, sums = sign_backward(product, input, shift, add, estimator, clip, beta)
    return as_rows(out), sums


def samples(v):
    half, brain = torch.float16, torch.bfloat16
    filters = v.words(32, 3, 3, 37)
    x, shift, add = (v.real(2, 37, 5, 6, dtype=half), v.real(37), v.real(2, 37, 5, 6, dtype=half))
    scale = v.integers(-1, 2, 32).double()
    approx = dict(dtype=half, estimator="approx_sign", clip=None)

    def grad(*shape):
        return channels_last(v.integers(-3, 4, *shape).to(FLOAT8))

    return [
        Sample((grad(2, 32, 5, 6), filters, 37, None, (5, 6), x, shift, add, (1,)), approx,
               kernel={}),
        Sample((grad(2, 32, 4, 5), filters, 37, None, (5, 6), None, None, None, (1, 0, 0, 1)),
               dict(dtype=brain), kernel={}),
        Sample((grad(2, 32, 5, 6).to(half), filters, 37, scale, (5, 6), x, None, add, (1,)),
               approx, kernel={}),
        Sample((grad(3, 144, 6, 4).to(half), v.words(144, 2, 3, 70), 70, None, (8, 8),
                channels_last(v.real(3, 70, 8, 8)), v.real(70), None, (1, 1, 2, 2), (4, 4)),
               dict(dtype=half, estimator="ste_sign"), kernel={}),
        Sample((grad(2, 32, 5, 6).to(brain), filters, 37, None, (5, 6), x.to(brain), None, None,
                (1,)), dict(dtype=brain, estimator="ste_sign"))]


define(Operator(
    schemas=("packed_conv2d_sign_backward(Tensor grad, Tensor weight_words, SymInt channels, "
             "Tensor? scale, SymInt[2] input_size, Tensor? input=None, Tensor? shift=None, "
             "Tensor? add=None, int[2] padding=0, int[2] dilation=1, *, ScalarType dtype, "
             "str estimator='identity', float? clip=1.0, float beta=5.0) -> (Tensor, Tensor)",),
    group="Training", check=check, fake=fake, reference=reference, samples=samples, batched=each,
    engine=False,
    text="""
packed_conv2d_input_grad in 16 bits, and sign_backward of its result in the same pass. The gradient
may also be in float8_e5m2; the weight's signs are then in float8_e4m3, and sums in float32.

Arguments:
  grad: float16, bfloat16 or float8_e5m2 (N, Cout, OH, OW).
  weight_words: int32 (Cout, kh, kw, ceil(channels / 32)).
  channels: of the input.
  scale: (Cout,) real, a factor of the weight; None: none, as it must be in float8.
  input_size: (H, W) of the input.
  input: float32, float16 or bfloat16 (N, channels, H, W), of the sign before the convolution; None:
    the result is the gradient of its signs.
  shift: as of sign_backward.
  add: as of sign_backward.
  padding: as of packed_conv2d, with zeros.
  dilation: as of packed_conv2d.
  dtype: float16 or bfloat16, of the result without an input, and of grad unless it is in float8.
  estimator: as of sign_backward; identity without an input.
  clip: as of sign_backward.
  beta: as of sign_backward.
Returns:
  (gradient (N, channels, H, W) in the input's dtype, channels-last; float64 (channels,): the sums
  of sign_backward, empty without an input).
Errors:
  shapes or types that do not fit, an unknown estimator, a clip below 0; tensors that require a
  gradient.
Example:
  >>> filters = ops.sign_pack(torch.randn(16, 32, 3, 3), dim=1)
  >>> grad = torch.randn(1, 16, 6, 6).to(torch.float8_e5m2)
  >>> of_signs, _ = ops.packed_conv2d_sign_backward(
  ...     grad, filters, 32, None, (6, 6), padding=1, dtype=torch.bfloat16)
  >>> of_signs.shape, of_signs.dtype
  (torch.Size([1, 32, 6, 6]), torch.bfloat16)
"""))
