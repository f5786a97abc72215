"""Wrong arguments: one RuntimeError that names operator, argument, what it takes and what it got.

The eager operator and the fake one (compile, export, meta) must say the same words.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

ops = torch.ops.bitkernels


def real(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def words(*shape, dtype=torch.int32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def grad(*shape):
    return torch.zeros(shape, requires_grad=True)


ROWS: list[tuple] = []


def row(op, text: str, *args, **kw):
    """A call of op and its message after 'bitkernels::name: '."""
    ROWS.append((op, text, args, kw))


CONV = words(2, 5, 6, 2), words(8, 3, 3, 2)
LINEAR = words(3, 2), words(8, 2)
TRAIN = real(2, 6, 5, 5), real(8, 6, 3, 3)
DENSE = real(3, 6), real(8, 6)


def conv(text, *args, x=CONV[0], w=CONV[1], channels=40, **kw):
    row(ops.packed_conv2d.default, text, x, w, channels, *args, **kw)


def conv_packed(text, **kw):
    row(ops.packed_conv2d.packed, text, *CONV, 40, **kw)


def linear(text, *args, x=LINEAR[0], w=LINEAR[1], channels=40, **kw):
    row(ops.packed_linear.default, text, x, w, channels, *args, **kw)


def train(text, *args, x=TRAIN[0], w=TRAIN[1], **kw):
    row(ops.binary_conv2d.default, text, x, w, *args, **kw)


def dense(text, *args, x=DENSE[0], w=DENSE[1], **kw):
    row(ops.binary_linear.default, text, x, w, *args, **kw)


def pool(text, *args, x=CONV[0], **kw):
    row(ops.packed_max_pool2d.default, text, x, *args, **kw)


# It is told what packed_conv2d is told.
SAYS = {ops.packed_conv2d_moments.default: "bitkernels::packed_conv2d"}


def moments(text, *args, x=CONV[0], w=CONV[1], channels=40, **kw):
    row(ops.packed_conv2d_moments.default, text, x, w, channels, *args, **kw)


def sign_grad(text, *args, g=DENSE[0][:2, :3], x=DENSE[0][:2, :3], **kw):
    row(ops.sign_backward.default, text, g, x, *args, **kw)


def block(text, x=TRAIN[0], w=TRAIN[1][:6], padding=(1,), **kw):
    row(ops.binary_residual_block.default, text, x, w, padding=padding, **kw)


# The passes of a residual block: where their arguments stand, and arguments that are right.
STREAM, SHORTS = real(2, 3, 4, 5), words(2, 3, 4, 5, dtype=torch.int16)
PASSES = [(name, op, {a.name: i for i, a in enumerate(op._schema.arguments)}) for name, op in (
    ("forward", ops.residual_block_forward.default),
    ("backward", ops.residual_block_backward.default),
    ("norm_backward", ops.residual_block_norm_backward.default))]
PASS_ARGUMENTS = {
    "forward": [SHORTS, STREAM, *[real(3) for _ in range(5)], False],
    "backward": [STREAM, SHORTS, STREAM, *[real(3) for _ in range(5)], False],
    "norm_backward": [STREAM, SHORTS, *[real(3) for _ in range(4)], False, torch.float32],
}


FLOATS = "float32, float16, bfloat16 or float64"
ESTIMATORS = "one of ste_sign, approx_sign, swish_sign, identity, none"

for op, more in ((ops.sign_pack.default, ()), (ops.sign_pack_mask.default, (1.0,))):
    row(op, f"input must be {FLOATS}, got int64 of shape (2, 3)", real(2, 3, dtype=torch.int64),
        *more)
    row(op, "dim must be in [-2, 1], got 2", real(2, 3), *more, None, 2)
    row(op, "dim must be in [-2, 1], got -3", real(2, 3), *more, None, -3)
    row(op, "input must be at least 1 channel wide, got float32 of shape (2, 0)", real(2, 0), *more)
    for shape, dim, takes, wrong in (
        ((2, 3), -1, "(3,) or (2, 3)", (2,)), ((2, 3), 1, "(3,) or (2, 3)", (1, 3)),
        ((2, 3, 4, 5), 1, "(3,) or (2, 3, 1, 1)", (2, 3)),
        ((2, 3, 4, 5), 1, "(3,) or (2, 3, 1, 1)", (1, 3, 1, 1)),
        ((2, 3, 4, 5), 1, "(3,) or (2, 3, 1, 1)", (2, 3, 4, 5)),
        ((2, 3, 4, 5), -1, "(5,) or (2, 1, 1, 5)", (2, 5, 1, 1)),
        ((2, 3, 4), 0, "(2,)", (2, 1, 1)), ((5,), 0, "(5,)", ())):
        row(op, f"shift must be of shape {takes}, got float32 of shape {wrong}", real(*shape),
            *more, real(*wrong), dim)
    row(op, f"shift must be {FLOATS}, got int32 of shape (3,)", real(2, 3), *more, words(3))
    row(op, "shift must be on cpu as the first argument, got meta", real(2, 3), *more,
        real(3, device="meta"))
    row(op, "input must not require grad, this operator has no gradient; use binary_conv2d or "
        "binary_linear to train, or .detach()", grad(2, 3), *more)
row(ops.sign_pack_mask.default, "clip must be at least 0, got -1", real(2, 3), -1.0)
row(ops.sign_pack_mask.default, "clip must be at least 0, got nan", real(2, 3), float("nan"))

row(ops.mask_grad.default, f"grad must be {FLOATS}, got int32 of shape (2, 3)", words(2, 3),
    words(2, 1))
row(ops.mask_grad.default, "mask_words must be int32 words, got int64 of shape (2, 1)",
    real(2, 3), words(2, 1, dtype=torch.int64))
row(ops.mask_grad.default, "mask_words must be 2 words wide for 33 channels, got int32 of shape "
    "(2, 1)", real(2, 33), words(2, 1))
row(ops.mask_grad.default, "mask_words must be of shape (2, 1), got int32 of shape (3, 1)",
    real(2, 3), words(3, 1))
row(ops.mask_grad.default, "mask_words must be 2-dimensional, got int32 of shape (2, 1, 1)",
    real(2, 3), words(2, 1, 1))
row(ops.mask_grad.default, "dim must be in [-2, 1], got 5", real(2, 3), words(2, 1), 5)

row(ops.unpack.default, "words must be int32 words, got uint8 of shape (2, 1)",
    words(2, 1, dtype=torch.uint8), 3)
row(ops.unpack.default, "words must be 2 words wide for 40 channels, got int32 of shape (2, 1)",
    words(2, 1), 40)
row(ops.unpack.default, "words must be 1 words wide for 32 channels, got int32 of shape ()",
    words(), 32)
row(ops.unpack.default, "channels must be at least 1, got 0", words(2, 0), 0)
row(ops.unpack.default, f"dtype must be {FLOATS}, got torch.int32", words(2, 1), 3, torch.int32)
row(ops.unpack.default, "dim must be in [-2, 1], got 2", words(2, 1), 3, torch.float32, 2)

row(ops.tile_weight.default, "weight_words must be int32 words of shape (Cout, kh, kw, words) or "
    "(Cout, words), got int32 of shape (3, 2, 1)", words(3, 2, 1))
row(ops.tile_weight.default, "weight_words must be int32 words of shape (Cout, kh, kw, words) or "
    "(Cout, words), got float32 of shape (3, 2)", real(3, 2))
row(ops.tile_weight.default, "groups must be a divisor of 3 output channels, got 2", words(3, 2), 2)
row(ops.tile_weight.default, "groups must be a divisor of 3 output channels, got 0", words(3, 2), 0)

conv("words must be int32 words, got float32 of shape (2, 5, 6, 2)", x=real(2, 5, 6, 2))
conv("words must be 4-dimensional, got int32 of shape (5, 6, 2)", x=words(5, 6, 2))
conv("words must be 3 words wide for 70 channels, got int32 of shape (2, 5, 6, 2)", channels=70)
conv("channels must be at least 1, got 0", channels=0)
conv("channels must be at least 1, got -5", channels=-5)
conv("weight_words must be int32 words, got float32 of shape (8, 3, 3, 2)", w=real(8, 3, 3, 2))
conv("weight_words must be 4-dimensional, or tiled by tile_weight, got int32 of shape (8, 2)",
     w=words(8, 2))
conv("weight_words must be 4-dimensional, or tiled by tile_weight, got int32 of shape "
     "(1, 3, 3, 2, 8)", w=words(1, 3, 3, 2, 8))
conv("weight_words must be 2 words wide for 40 channels per group, got int32 of shape "
     "(8, 3, 3, 1)", w=words(8, 3, 3, 1))
conv("weight_words must be 1 words wide for 20 channels per group, got int32 of shape "
     "(8, 3, 3, 2)", (1,), (0,), (1,), 2)
conv("weight_words must be a filter of at least 1x1, got int32 of shape (8, 0, 3, 2)",
     w=words(8, 0, 3, 2))
conv("weight_words must be on cpu as the first argument, got meta",
     w=words(8, 3, 3, 2, device="meta"))
conv("groups must be a divisor of 40 input and 8 output channels, got 3", (1,), (0,), (1,), 3)
conv("groups must be a divisor of 40 input and 8 output channels, got 5", (1,), (0,), (1,), 5,
     w=words(8, 3, 3, 1))
conv("groups must be a divisor of 40 input and 8 output channels, got 0", (1,), (0,), (1,), 0)
conv("out_channels must be 8, the first size of weight_words, got 9", out_channels=9)
conv("out_channels must be what 1 tiles of 16 hold, got 17", w=words(1, 3, 3, 2, 16),
     out_channels=17)
conv("stride must be at least 1, got [0, 1]", (0, 1))
conv("stride must be one or two integers, got [1, 1, 1]", (1, 1, 1))
conv("padding must be at least 0, got [0, -1]", (1,), (0, -1))
conv("padding must be one, two (height, width) or four (top, bottom, left, right) integers, got "
     "[1, 1, 1]", (1,), (1, 1, 1))
conv("dilation must be at least 1, got [1, 0]", (1,), (0,), (1, 0))
conv("kernel must be at most the padded input size 5, got a reach of 7", (1,), (0,), (3,))
conv("kernel must be at most the padded input size 6, got a reach of 9", (1,), (0,), (1, 4))
conv("padding must be such that the output has at most 2^40 pixels, got 4294967297 x 4294967298",
     (1,), (2**31 - 1,))
conv("pad_value must be -1, 0 or 1, got 2", pad_value=2)
conv("scale must be of shape (8,), got float32 of shape (7,)", scale=real(7))
conv("bias must be of shape (8,), got float32 of shape (8, 1)", bias=real(8, 1))
conv(f"bias must be {FLOATS}, got int32 of shape (8,)", bias=words(8))
conv("slope must be of shape (8,), got float32 of shape ()", slope=real())
conv("slope must be given with shift_in or shift_out, got None", shift_in=real(8))
conv("shift_out must be on cpu as the first argument, got meta",
     shift_out=real(8, device="meta"), slope=real(8))
conv("residual must be of shape (2, 8, 3, 4), got float32 of shape (2, 8, 1, 1)",
     residual=real(2, 8, 1, 1))
conv(f"residual must be {FLOATS}, got int32 of shape (2, 8, 3, 4)", residual=words(2, 8, 3, 4))
conv("dtype must be a real type when the epilogue has scale, bias, ..., got torch.int32",
     scale=real(8), dtype=torch.int32)
conv("dtype must be a real type when the epilogue has scale, bias, ..., got torch.int32",
     clamp_min=0.0, dtype=torch.int32)
conv("dtype must be float32, float16, bfloat16, float64 or int32, got torch.int8", dtype=torch.int8)
conv("scale must not require grad, this operator has no gradient; use binary_conv2d or "
     "binary_linear to train, or .detach()", scale=grad(8))
conv_packed("threshold must be int32 of shape (2, 8), got int32 of shape (8, 2)",
            threshold=words(8, 2))
conv_packed("threshold must be int32 of shape (2, 8), got float32 of shape (2, 8)",
            threshold=real(2, 8))
conv_packed("threshold must be alone, without scale, bias, ..., got both", threshold=words(2, 8),
            scale=real(8))
conv_packed("threshold must be alone, without scale, bias, ..., got both", threshold=words(2, 8),
            sign_shift=real(8))
conv_packed("sign_shift must be of shape (8,), got float32 of shape (9,)", sign_shift=real(9))
row(ops.packed_conv2d.both, "scale must be of shape (8,), got float32 of shape (1,)",
    words(2, 5, 6, 2), words(8, 3, 3, 2), 40, scale=real(1))

linear("words must be int32 words, got int64 of shape (3, 2)", x=words(3, 2, dtype=torch.int64))
linear("words must be 1 words wide for 32 channels, got int32 of shape (3, 2)", channels=32)
linear("weight_words must be 2 words wide for 40 channels, got int32 of shape (8, 3)",
       w=words(8, 3))
linear("weight_words must be 2-dimensional, or tiled by tile_weight, got int32 of shape (2,)",
       w=words(2))
linear("weight_words must be on cpu as the first argument, got meta", w=words(8, 2, device="meta"))
linear("out_channels must be what 1 tiles of 16 hold, got 0", w=words(1, 2, 16), out_channels=0)
linear("residual must be of shape (3, 8), got float32 of shape (8,)", residual=real(8))
row(ops.packed_linear.packed, "threshold must be int32 of shape (2, 8), got int32 of shape (8,)",
    words(3, 2), words(8, 2), 40, threshold=words(8))
row(ops.packed_linear.both, "bias must be of shape (8,), got float32 of shape (3,)",
    words(3, 2), words(8, 2), 40, bias=real(3))

pool("words must be int32 words of shape (N, H, W, words), got float32 of shape (2, 5, 6, 2)",
     (2,), x=real(2, 5, 6, 2))
pool("words must be int32 words of shape (N, H, W, words), got int32 of shape (5, 6, 2)", (2,),
     x=words(5, 6, 2))
pool("kernel_size must be at least 1, got [0, 2]", (0, 2))
pool("kernel_size must be one or two integers, got [2, 2, 2]", (2, 2, 2))
pool("stride must be at least 1, got [0, 0]", (2,), (0, 0))
pool("padding must be at most half of kernel_size, got [2, 2]", (3,), (1,), (2, 2))
pool("padding must be at least 0, got [-1, 0]", (3,), (1,), (-1, 0))
pool("dilation must be at least 1, got [0, 1]", (3,), (1,), (0,), (0, 1))
pool("kernel_size must be at most the padded input size 5, got a reach of 6", (6, 1))
pool("kernel_size must be at most the padded input size 6, got a reach of 7", (1, 3), (), (0,),
     (1, 3))

train(f"input must be {FLOATS}, got int32 of shape (2, 6, 5, 5)", x=words(2, 6, 5, 5))
train("input must be (N, C, H, W) or (C, H, W), got float32 of shape (6, 5)", x=real(6, 5))
train("weight must be 4-dimensional, got float32 of shape (8, 6)", w=real(8, 6))
train(f"weight must be {FLOATS}, got int8 of shape (8, 6, 3, 3)",
      w=real(8, 6, 3, 3, dtype=torch.int8))
train("input must be 5 channels wide for a weight of shape (8, 5, 3, 3), got 6 channels in float32 "
      "of shape (2, 6, 5, 5)", w=real(8, 5, 3, 3))
train("input must be 6 channels wide for a weight of shape (8, 6, 3, 3), got 7 channels in float32 "
      "of shape (7, 5, 5)", x=real(7, 5, 5))
train("input must be 12 channels wide for a weight of shape (8, 6, 3, 3) in 2 groups, got 6 "
      "channels in float32 of shape (2, 6, 5, 5)", None, (1,), (0,), (1,), 2)
train("weight must be on cpu as the first argument, got meta", w=real(8, 6, 3, 3, device="meta"))
train("groups must be a divisor of 8 output channels, got 3", None, (1,), (0,), (1,), 3)
train("groups must be a divisor of 8 output channels, got 0", None, (1,), (0,), (1,), 0)
train("bias must be of shape (8,), got float32 of shape (6,)", real(6))
train("scale must be of shape (8,), got float32 of shape (8, 1, 1)", scale=real(8, 1, 1))
train("stride must be at least 1, got [0, 0]", None, (0, 0))
train("padding must be at least 0, got [-1, -1]", None, (1,), (-1, -1))
train("dilation must be at least 1, got [0, 0]", None, (1,), (0,), (0, 0))
train("pad_value must be -1, 0 or 1, got -2", pad_value=-2)
train("kernel must be at most the padded input size 5, got a reach of 6", w=real(8, 6, 6, 1))
train(f"input_estimator must be {ESTIMATORS}, got 'ste'", input_estimator="ste")
train(f"weight_estimator must be {ESTIMATORS}, got ''", weight_estimator="")
train("input_clip must be at least 0, got -1", input_clip=-1.0)
train("weight_clip must be at least 0, got -1", weight_clip=-1.0)
train(f"dtype must be {FLOATS}, got torch.int32", dtype=torch.int32)
row(ops.binary_conv2d.padding, "padding must be 'same', 'valid' or integers, got 'full'",
    real(2, 6, 5, 5), real(8, 6, 3, 3), None, (1,), "full")
row(ops.binary_conv2d.padding, "stride must be 1 with padding='same', got [2, 2]",
    real(2, 6, 5, 5), real(8, 6, 3, 3), None, (2, 2), "same")

TRANSPOSED = real(2, 6, 5, 5), real(6, 4, 3, 3)


def transposed(text, *args, x=TRANSPOSED[0], w=TRANSPOSED[1], **kw):
    row(ops.binary_conv_transpose2d.default, text, x, w, *args, **kw)


transposed("input must be (N, C, H, W) or (C, H, W), got float32 of shape (6, 5)", x=real(6, 5))
transposed(f"input must be {FLOATS}, got int64 of shape (2, 6, 5, 5)",
           x=real(2, 6, 5, 5, dtype=torch.int64))
transposed("input must be 6 channels wide for a weight of shape (6, 4, 3, 3), got 4 channels in "
           "float32 of shape (2, 4, 5, 5)", x=real(2, 4, 5, 5))
transposed("input must be at least 1 x 1 in size, got [0, 5]", x=real(2, 6, 0, 5))
transposed("weight must be 4-dimensional, got float32 of shape (6, 4, 3)", w=real(6, 4, 3))
transposed("weight must be of at least one channel and tap, got float32 of shape (6, 4, 0, 3)",
           w=real(6, 4, 0, 3))
transposed("weight must be on cpu as the first argument, got meta",
           w=real(6, 4, 3, 3, device="meta"))
transposed("groups must be a divisor of 6 input channels, got 4", None, (1,), (0,), (0,), 4)
transposed("groups must be a divisor of 6 input channels, got 0", None, (1,), (0,), (0,), 0)
transposed("bias must be of shape (8,), got float32 of shape (4,)", real(4), (1,), (0,), (0,), 2)
transposed("scale must be of shape (4,), got float32 of shape (6,)", scale=real(6))
transposed("stride must be at least 1, got [0, 0]", None, (0, 0))
transposed("dilation must be at least 1, got [1, 0]", None, (1,), (0,), (0,), 1, (1, 0))
transposed("padding must be at least 0, got [-1, 0]", None, (1,), (-1, 0))
transposed("output_padding must be at least 0, got [0, -1]", None, (2,), (0,), (0, -1))
transposed("output_padding must be smaller than stride or dilation, got [0, 2]", None, (2,), (0,),
           (0, 2))
transposed("padding must be small enough for an output of at least 1 x 1, got [4, 4] and an output "
           "of -1 x -1", None, (1,), (4, 4))
transposed(f"input_estimator must be {ESTIMATORS}, got 'ste'", input_estimator="ste")
transposed("weight_clip must be at least 0, got -1", weight_clip=-1.0)
transposed(f"dtype must be {FLOATS}, got torch.int32", dtype=torch.int32)
transposed("scale must be on cpu as the first argument, got meta", scale=real(4, device="meta"))



def packed_transposed(text, *args, x=CONV[0], w=CONV[1], channels=40, **kw):
    row(ops.packed_conv_transpose2d.default, text, x, w, channels, *args, **kw)


packed_transposed("words must be int32 words, got float32 of shape (2, 5, 6, 2)",
                  x=real(2, 5, 6, 2))
packed_transposed("words must be 4-dimensional, got int32 of shape (5, 6, 2)", x=words(5, 6, 2))
packed_transposed("words must be 3 words wide for 80 channels, got int32 of shape (2, 5, 6, 2)",
                  channels=80)
packed_transposed("words must be at least 1 x 1 in size, got [5, 0]", x=words(2, 5, 0, 2))
packed_transposed("channels must be at least 1, got 0", channels=0)
packed_transposed("weight_words must be 1 words wide for 20 channels, got int32 of shape "
                  "(8, 3, 3, 2)", (1,), (0,), (0,), 2)
packed_transposed("weight_words must be 4-dimensional, got int32 of shape (1, 3, 3, 2, 16)",
                  w=words(1, 3, 3, 2, 16))
packed_transposed("weight_words must be of at least one channel and tap, got int32 of shape "
                  "(8, 3, 0, 2)", w=words(8, 3, 0, 2))
packed_transposed("weight_words must be on cpu as the first argument, got meta",
                  w=words(8, 3, 3, 2, device="meta"))
packed_transposed("groups must be a divisor of 40 input and 8 output channels, got 5", (1,), (0,),
                  (0,), 5)
packed_transposed("stride must be one or two integers, got [1, 1, 1]", (1, 1, 1))
packed_transposed("output_padding must be smaller than stride or dilation, got [1, 1]", (1,), (0,),
                  (1, 1))
packed_transposed("padding must be small enough for an output of at least 1 x 1, got [4, 4] and an "
                  "output of -1 x 0", (1,), (4,))
packed_transposed("bias must be of shape (8,), got float32 of shape (9,)", bias=real(9))
packed_transposed("dtype must be a real type when the epilogue has scale, bias, ..., got "
                  "torch.int32", scale=real(8), dtype=torch.int32)
packed_transposed("bias must not require grad, this operator has no gradient; use binary_conv2d or "
                  "binary_linear to train, or .detach()", bias=grad(8))

dense(f"input must be {FLOATS}, got int32 of shape (3, 6)", x=words(3, 6))
dense("input must be (..., 6) for a weight of shape (8, 6), got float32 of shape (3, 5)",
      x=real(3, 5))
dense("input must be (..., 6) for a weight of shape (8, 6), got float32 of shape ()", x=real())
dense("weight must be 2-dimensional, got float32 of shape (6,)", w=real(6))
dense("weight must be on cpu as the first argument, got meta", w=real(8, 6, device="meta"))
dense("bias must be of shape (8,), got float32 of shape (1,)", real(1))
dense("scale must be of shape (8,), got float32 of shape ()", scale=real())
dense(f"weight_estimator must be {ESTIMATORS}, got 'sign'", weight_estimator="sign")
dense("input_clip must be at least 0, got nan", input_clip=float("nan"))
dense(f"dtype must be {FLOATS}, got torch.int64", dtype=torch.int64)

row(ops.rsign.default, f"input must be {FLOATS}, got int32 of shape (2, 3)", words(2, 3), real(3))
row(ops.rsign.default, "input must be (N, C, ...), got float32 of shape (3,)", real(3), real(3))
row(ops.rsign.default, "input must be 4 channels wide for a shift of shape (4,), got 3 channels "
    "in float32 of shape (2, 3, 4)", real(2, 3, 4), real(4))
for wrong in ((3, 1, 1), (2, 3), (1, 3, 1), (2, 3, 4), (3, 1), (2, 4, 1), ()):
    row(ops.rsign.default, "shift must be of shape (3,) or (2, 3, 1), got float32 of shape "
        f"{wrong}", grad(2, 3, 4), real(*wrong))
row(ops.rsign.default, f"shift must be {FLOATS}, got int32 of shape (2, 3, 1)", real(2, 3, 4),
    words(2, 3, 1))
row(ops.rsign.default, "shift must be on cpu as the first argument, got meta", real(2, 3, 4),
    real(2, 3, 1, device="meta"))
row(ops.rprelu.default, "input must be 4 channels wide for a shift_in of shape (4,), got 3 "
    "channels in float32 of shape (2, 3)", real(2, 3), real(4), real(4), real(4))
row(ops.rprelu_backward.default, "input must be 1 channels wide for a shift_in of shape (1,), got "
    "3 channels in float32 of shape (2, 3)", real(2, 3), real(2, 3), real(1), real(1))
row(ops.rsign.default, f"estimator must be {ESTIMATORS}, got 'tanh'", real(2, 3), real(3),
    estimator="tanh")
row(ops.rsign.default, "clip must be at least 0, got -0.5", grad(2, 3), real(3),
    estimator="ste_sign", clip=-0.5)
row(ops.rprelu.default, "input must be (N, C, ...), got float32 of shape (3,)", real(3), real(3),
    real(3), real(3))
row(ops.rprelu.default, "slope must be of shape (3,), got float32 of shape (1,)", grad(2, 3),
    real(3), real(1), real(3))
row(ops.rprelu.default, f"shift_out must be {FLOATS}, got int32 of shape (3,)", real(2, 3),
    real(3), real(3), words(3))
row(ops.rprelu.default, "shift_in must be on cpu as the first argument, got meta", real(2, 3),
    real(3, device="meta"), real(3), real(3))
row(ops.rprelu_backward.default, "slope must be of shape (3,), got float32 of shape (2,)",
    real(2, 3), real(2, 3), real(3), real(2))
row(ops.rprelu_backward.default, "grad must be float32 of shape (2, 3), got float32 of "
    "shape (2, 4)", real(2, 4), real(2, 3), real(3), real(3))
row(ops.rprelu_backward.default, "grad must be on cpu as the first argument, got meta",
    real(2, 3, device="meta"), real(2, 3), real(3), real(3))

moments("words must be int32 words, got float32 of shape (2, 5, 6, 2)", x=real(2, 5, 6, 2))
moments("words must be 3 words wide for 70 channels, got int32 of shape (2, 5, 6, 2)", channels=70)
moments("groups must be a divisor of 40 input and 8 output channels, got 3", (1,), (0,), (1,), 3)
moments("stride must be at least 1, got [0, 1]", (0, 1))
moments("kernel must be at most the padded input size 5, got a reach of 7", (1,), (0,), (3,))
moments("pad_value must be -1, 0 or 1, got 2", pad_value=2)
moments("out_channels must be 8, the first size of weight_words, got 9", out_channels=9)

DOT = f"of shape {tuple(STREAM.shape)}"
for name, op, at in PASSES:
    def passes(text, arguments, op=op):
        row(op, text, *arguments)

    def changed(at, t, name=name):
        return [t if i == at else a for i, a in enumerate(PASS_ARGUMENTS[name])]

    passes("dot must be int16 or int32 of shape (N, C, H, W), got float32 of shape (2, 3, 4, 5)",
           changed(at["dot"], STREAM))
    passes("dot must be int16 or int32 of shape (N, C, H, W), got int32 of shape (2, 3, 4)",
           changed(at["dot"], words(2, 3, 4)))
    passes("slope must be of shape (3,), got float32 of shape (4,)" if "slope" in at else
           "q must be of shape (3,), got float32 of shape (4,)",
           changed(at.get("slope", at.get("q")), real(4)))
    vector = "center" if "center" in at else "bias"
    passes(f"{vector} must be {FLOATS}, got int32 of shape (3,)", changed(at[vector], words(3)))
    passes(f"{vector} must be on cpu as the first argument, got meta",
           changed(at[vector], real(3, device="meta")))
    main = "residual" if name == "forward" else "grad"
    passes(f"{main} must be {FLOATS}, got int32 of shape (2, 3, 4, 5)",
           changed(at[main], words(2, 3, 4, 5)))
    passes(f"{main} must be float32 {DOT}, got float32 of shape (2, 3, 5, 4)",
           changed(at[main], real(2, 3, 5, 4)))
    passes(f"{main} must not require grad, this operator has no gradient; use binary_conv2d or "
           "binary_linear to train, or .detach()", changed(at[main], grad(2, 3, 4, 5)))
row(ops.residual_block_backward.default, "residual must be given with slope, got None",
    STREAM, SHORTS, None, real(3), real(3), None, real(3), real(3), False)
row(ops.residual_block_backward.default, f"residual must be float32 {DOT}, got float16 {DOT}",
    STREAM, SHORTS, STREAM.half(), real(3), real(3), None, real(3), real(3), False)
for dtype in (torch.float64, torch.int32):
    row(ops.residual_block_norm_backward.default, "dtype must be a real type, float64 for float64 "
        f"only, got {dtype}", *PASS_ARGUMENTS["norm_backward"][:-1], dtype)

sign_grad(f"input must be {FLOATS}, got int32 of shape (2, 3)", x=words(2, 3))
sign_grad("input must be (N, C, ...), got float32 of shape (3,)", x=real(3), g=real(3))
sign_grad("grad must be float32 of shape (2, 3), got float32 of shape (3, 2)", g=real(3, 2))
sign_grad("grad must be float32 of shape (2, 3), got float64 of shape (2, 3)",
          g=real(2, 3, dtype=torch.float64))
sign_grad("grad must be on cpu as the first argument, got meta", g=real(2, 3, device="meta"))
sign_grad("add must be float32 of shape (2, 3), got float16 of shape (2, 3)", None,
          real(2, 3, dtype=torch.float16))
sign_grad("shift must be of shape (3,), got float32 of shape (2,)", real(2))
sign_grad("estimator must be one of ste_sign, approx_sign, swish_sign, identity, got 'none'",
          estimator="none")
sign_grad("clip must be at least 0, got -1", clip=-1.0)
sign_grad("input must not require grad, this operator has no gradient; use binary_conv2d or "
          "binary_linear to train, or .detach()", x=grad(2, 3))

block(f"input must be {FLOATS}, got int32 of shape (2, 6, 5, 5)", x=words(2, 6, 5, 5))
block("input must be 4-dimensional, got float32 of shape (6, 5, 5)", x=real(6, 5, 5))
block("input must be 5 channels wide for a weight of shape (6, 5, 3, 3), got 6 channels in float32 "
      "of shape (2, 6, 5, 5)", w=real(6, 5, 3, 3))
block("residual must be float32 of shape (2, 6, 3, 3), got float32 of shape (2, 6, 5, 5)",
      padding=(0,))
block("residual must be float32 of shape (2, 8, 5, 5), got float32 of shape (2, 6, 5, 5)",
      w=real(8, 6, 3, 3))
block("residual must be float32 of shape (2, 6, 5, 5), got float64 of shape (2, 6, 5, 5)",
      residual=real(2, 6, 5, 5, dtype=torch.float64))
block("residual must be on cpu as the first argument, got meta",
      residual=real(2, 6, 5, 5, device="meta"))
block("input must be of more than 1 value per channel in the output, got float32 of shape "
      "(1, 6, 1, 1)", x=real(1, 6, 1, 1))
block("input must be of more than 1 value per channel in the output, got float32 of shape "
      "(0, 6, 5, 5)", x=real(0, 6, 5, 5))
block("norm_weight must be of shape (6,), got float32 of shape (1,)", norm_weight=real(1))
block("sign_shift must be of shape (6,), got float32 of shape (6, 1, 1)",
      sign_shift=real(6, 1, 1))
block(f"slope must be {FLOATS}, got int32 of shape (6,)", slope=words(6))
block("shift_out must be on cpu as the first argument, got meta", slope=real(6),
      shift_out=real(6, device="meta"))
block("slope must be given with shift_in or shift_out, got None", shift_in=real(6))
block("scale must be of shape (6,), got float32 of shape (3,)", scale=real(3))
block("eps must be at least 0, got -1", eps=-1.0)
block("eps must be at least 0, got nan", eps=float("nan"))
block("groups must be a divisor of 6 output channels, got 4", groups=4)
block("stride must be at least 1, got [0, 0]", stride=(0, 0))
block("pad_value must be -1, 0 or 1, got 3", pad_value=3)
block(f"input_estimator must be {ESTIMATORS}, got 'ste'", input_estimator="ste")
block(f"weight_estimator must be {ESTIMATORS}, got 'ste'", weight_estimator="ste")
block("input_clip must be at least 0, got -1", input_clip=-1.0)
block("weight_clip must be at least 0, got nan", weight_clip=float("nan"))
block(f"dtype must be {FLOATS}, got torch.int32", dtype=torch.int32)
block("dtype must be a real type, float64 for float64 only, got torch.float64",
      dtype=torch.float64)


def identify(entry) -> str:
    op, text, *_ = entry
    return f"{op.__name__}-{text[:48]}"


def failure(op, args, kw) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        op(*args, **kw)
    return caught.value


def assert_says(error: RuntimeError, op, text: str) -> None:
    name = SAYS.get(op, op._schema.name)
    assert type(error) is RuntimeError and error.__cause__ is None
    assert str(error) == f"{name}: {text}"


@pytest.mark.parametrize("op,text,args,kw", ROWS, ids=map(identify, ROWS))
def test_eager_message(op, text, args, kw):
    assert_says(failure(op, args, kw), op, text)
    assert re.fullmatch(r"\w+ must (be|not) .+(, got .+|\.detach\(\))", text)


@pytest.mark.parametrize("op,text,args,kw", ROWS, ids=map(identify, ROWS))
def test_fake_message_is_the_same(op, text, args, kw):
    mode = FakeTensorMode()
    fake_args, fake_kw = tree_map_only(torch.Tensor, mode.from_tensor, (args, kw))
    with mode:
        assert_says(failure(op, fake_args, fake_kw), op, text)


def test_training_shape_error_also_in_inference_mode():
    with torch.inference_mode():
        error = failure(ops.binary_linear.default, (real(3, 5), real(8, 6)), {})
    assert_says(error, ops.binary_linear.default,
                "input must be (..., 6) for a weight of shape (8, 6), got float32 of shape (3, 5)")


def test_raw_operators_accept_parameters_without_grad_mode():
    scale = torch.ones(8, requires_grad=True)
    with torch.no_grad():
        y = ops.packed_linear(words(3, 2), words(8, 2), 40, scale=scale)
    assert not y.requires_grad and (y == 40).all()
