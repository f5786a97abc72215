"""Wrong arguments of the trained operators and the passes of a residual block, by hand."""

from __future__ import annotations

import torch

from bitkernels_tests.ops.wrong import ESTIMATORS, FLOATS, grad, real, row, words

ops = torch.ops.bitkernels
TRAIN = real(2, 6, 5, 5), real(8, 6, 3, 3)
DENSE = real(3, 6), real(8, 6)
TRANSPOSED = real(2, 6, 5, 5), real(6, 4, 3, 3)
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


def train(text, *args, x=TRAIN[0], w=TRAIN[1], **kw):
    row(ops.binary_conv2d.default, text, x, w, *args, **kw)


def dense(text, *args, x=DENSE[0], w=DENSE[1], **kw):
    row(ops.binary_linear.default, text, x, w, *args, **kw)


def transposed(text, *args, x=TRANSPOSED[0], w=TRANSPOSED[1], **kw):
    row(ops.binary_conv_transpose2d.default, text, x, w, *args, **kw)


def sign_grad(text, *args, g=DENSE[0][:2, :3], x=DENSE[0][:2, :3], **kw):
    row(ops.sign_backward.default, text, g, x, *args, **kw)


def block(text, x=TRAIN[0], w=TRAIN[1][:6], padding=(1,), **kw):
    row(ops.binary_residual_block.default, text, x, w, padding=padding, **kw)


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
for height, width in ((0, 3), (3, 0)):
    train(f"weight must be a filter of at least 1x1, got shape (8, 6, {height}, {width})",
          w=real(8, 6, height, width))
train(f"input_estimator must be {ESTIMATORS}, got 'ste'", input_estimator="ste")
train(f"weight_estimator must be {ESTIMATORS}, got ''", weight_estimator="")
train("input_clip must be at least 0, got -1", input_clip=-1.0)
train("weight_clip must be at least 0, got -1", weight_clip=-1.0)
train("beta must be above 0 and finite, got nan", input_estimator="swish_sign", beta=float("nan"))
train(f"dtype must be {FLOATS}, got torch.int32", dtype=torch.int32)
row(ops.binary_conv2d.padding, "padding must be 'same', 'valid' or integers, got 'full'",
    real(2, 6, 5, 5), real(8, 6, 3, 3), None, (1,), "full")
row(ops.binary_conv2d.padding, "stride must be 1 with padding='same', got [2, 2]",
    real(2, 6, 5, 5), real(8, 6, 3, 3), None, (2, 2), "same")



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
transposed("beta must be above 0 and finite, got -5", weight_estimator="swish_sign", beta=-5.0)
transposed("weight_clip must be at least 0, got -1", weight_clip=-1.0)
transposed(f"dtype must be {FLOATS}, got torch.int32", dtype=torch.int32)
transposed("scale must be on cpu as the first argument, got meta", scale=real(4, device="meta"))

dense(f"input must be {FLOATS}, got int32 of shape (3, 6)", x=words(3, 6))
dense("input must be (..., 6) for a weight of shape (8, 6), got float32 of shape (3, 5)",
      x=real(3, 5))
dense("input must be (..., 6) for a weight of shape (8, 6), got float32 of shape ()", x=real())
dense("weight must be 2-dimensional, got float32 of shape (6,)", w=real(6))
dense("weight must be of at least 1 input channel, got float32 of shape (8, 0)", x=real(3, 0),
      w=real(8, 0))
dense("weight must be on cpu as the first argument, got meta", w=real(8, 6, device="meta"))
dense("bias must be of shape (8,), got float32 of shape (1,)", real(1))
dense("scale must be of shape (8,), got float32 of shape ()", scale=real())
dense(f"weight_estimator must be {ESTIMATORS}, got 'sign'", weight_estimator="sign")
dense("beta must be above 0 and finite, got 0", input_estimator="swish_sign", beta=0.0)
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
row(ops.rsign.default, "beta must be above 0 and finite, got inf", grad(2, 3), real(3),
    estimator="swish_sign", beta=float("inf"))
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
sign_grad("beta must be above 0 and finite, got -0.5", estimator="swish_sign", beta=-0.5)
sign_grad("clip must be at least 0, got -1", clip=-1.0)
sign_grad("input must not require grad, this operator has no gradient; use binary_conv2d or "
          "binary_linear to train, or .detach()", x=grad(2, 3))

block(f"input must be {FLOATS}, got int32 of shape (2, 6, 5, 5)", x=words(2, 6, 5, 5))
block("input must be 4-dimensional, got float32 of shape (6, 5, 5)", x=real(6, 5, 5))
block("group must be the name of a process group, or None, got 'unknown'", group="unknown")
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
block("beta must be above 0 and finite, got 0", weight_estimator="swish_sign", beta=0.0)
block("weight_clip must be at least 0, got nan", weight_clip=float("nan"))
block(f"dtype must be {FLOATS}, got torch.int32", dtype=torch.int32)
block("dtype must be a real type, float64 for float64 only, got torch.float64",
      dtype=torch.float64)
block("input_grad_dtype must be float8_e5m2 or None, got torch.float16", dtype=torch.float16,
      input_grad_dtype=torch.float16)
block("dtype must be float16 or bfloat16, or the input, with input_grad_dtype, got torch.float32",
      input_grad_dtype=torch.float8_e5m2)


MOMENTS = words(3, 4, dtype=torch.int64)
SUMS, VECTORS = real(4, 4, dtype=torch.float64), real(6, 4, dtype=torch.float64)


def statistics(text, moments=MOMENTS, scale=None, eps=1e-5, dtype=torch.float32):
    row(ops.residual_block_statistics.default, text, moments, scale, None, None, eps, dtype)


def gradients(text, sums=SUMS, total=None, vectors=VECTORS, scale=None, dtype=torch.float32):
    row(ops.residual_block_gradients.default, text, sums, total, vectors, scale, dtype)


for shape in ((3, 4, 1), (4, 3)):
    statistics(f"moments must be int64 or float64 of shape (3, C), got int64 of shape {shape}",
               words(*shape, dtype=torch.int64))
statistics("moments must be int64 or float64 of shape (3, C), got float32 of shape (3, 4)",
           real(3, 4))
statistics("scale must be of shape (4,), got float32 of shape (3,)", scale=real(3))
statistics("scale must be on cpu as the first argument, got meta", scale=real(4, device="meta"))
statistics("eps must be at least 0, got -1", eps=-1.0)
statistics("dtype must be a real type, got torch.int32", dtype=torch.int32)
statistics("scale must not require grad, this operator has no gradient; use binary_conv2d or "
           "binary_linear to train, or .detach()", scale=grad(4))
gradients("sums must be float64 of shape (4, C), got float32 of shape (4, 4)", real(4, 4))
gradients("total must be float64 of shape (2, 4), got float64 of shape (4, 4)",
          total=real(4, 4, dtype=torch.float64))
gradients("vectors must be float64 of shape (6, 4), got float64 of shape (6, 3)",
          vectors=real(6, 3, dtype=torch.float64))
gradients("vectors must be on cpu as the first argument, got meta",
          vectors=real(6, 4, dtype=torch.float64, device="meta"))
gradients("scale must be of shape (4,), got float32 of shape (3,)", scale=real(3))
gradients("dtype must be a real type, got torch.int32", dtype=torch.int32)
gradients("scale must not require grad, this operator has no gradient; use binary_conv2d or "
          "binary_linear to train, or .detach()", scale=grad(4))


def latent(text, g=DENSE[1], w=DENSE[1], *args, **kw):
    row(ops.latent_weight_grad.default, text, g, w, *args, **kw)


latent(f"weight must be {FLOATS}, got int32 of shape (8, 6)", w=words(8, 6))
latent(f"grad must be {FLOATS}, got int32 of shape (8, 6)", words(8, 6))
latent("weight must be (Cout, ...), got float32 of shape (8,)", real(8), real(8))
latent("grad must be float32 of shape (8, 6), got float32 of shape (6, 8)", real(6, 8))
latent("grad must be float32 of shape (8, 6), got float64 of shape (8, 6)",
       real(8, 6, dtype=torch.float64))
latent("grad must be on cpu as the first argument, got meta", real(8, 6, device="meta"))
latent("scale must be of shape (8,), got float32 of shape (6,)", scale=real(6))
latent("estimator must be one of ste_sign, approx_sign, swish_sign, identity, none, got 'relu'",
       estimator="relu")
latent("beta must be above 0 and finite, got nan", estimator="swish_sign", beta=float("nan"))
latent("clip must be at least 0, got -1", clip=-1.0)
latent("weight must not require grad, this operator has no gradient; use binary_conv2d or "
       "binary_linear to train, or .detach()", w=grad(8, 6))


HALF, FLOAT8 = torch.float16, torch.float8_e5m2
SIX, PLANE, DOTS = real(6), real(2, 6, 5, 5), words(2, 6, 5, 5)


def norm8(text, g=PLANE, dot=DOTS, p=SIX, scale=None, dtype=HALF):
    row(ops.residual_block_norm_backward_float8.default, text, g, dot, p, SIX, SIX, SIX, scale,
        False, dtype)


norm8(f"grad must be {FLOATS}, got int32 of shape (2, 6, 5, 5)", words(2, 6, 5, 5))
norm8("grad must be float32, float16 or bfloat16, got float64 of shape (2, 6, 5, 5)",
      real(2, 6, 5, 5, dtype=torch.float64))
norm8("grad must be float32 of shape (2, 6, 5, 5), got float32 of shape (2, 6, 5, 4)",
      real(2, 6, 5, 4))
norm8("dot must be int16 or int32 of shape (N, C, H, W), got float32 of shape (2, 6, 5, 5)",
      dot=real(2, 6, 5, 5))
norm8("p must be of shape (6,), got float32 of shape (5,)", p=real(5))
norm8("scale must be of shape (6,), got float32 of shape (5,)", scale=real(5))
norm8("scale must be on cpu as the first argument, got meta", scale=real(6, device="meta"))
norm8("dtype must be float16 or bfloat16, got torch.float32", dtype=torch.float32)
norm8("p must not require grad, this operator has no gradient; use binary_conv2d or "
      "binary_linear to train, or .detach()", p=grad(6))


IMAGE, FILTERS = real(2, 37, 5, 5, dtype=HALF), words(6, 3, 3, 2)
ROUNDED = real(2, 6, 5, 5, dtype=FLOAT8)


def through(text, g=ROUNDED, filters=FILTERS, *, channels=37, scale=None, size=(5, 5), x=None,
            dtype=HALF, padding=(1,), **kw):
    row(ops.packed_conv2d_sign_backward.default, text, g, filters, channels, scale, size, x,
        padding=padding, dtype=dtype, **kw)


through("grad must be float16 or float8_e5m2 of shape (N, 6, OH, OW), got float32 of shape "
        "(2, 6, 5, 5)", real(2, 6, 5, 5))
through("grad must be float16 or float8_e5m2 of shape (N, 6, OH, OW), got float8_e5m2 of shape "
        "(2, 5, 5, 5)", real(2, 5, 5, 5, dtype=FLOAT8))
through("grad must be of shape (2, 6, 4, 5), got float8_e5m2 of shape (2, 6, 5, 5)", size=(4, 5))
through("weight_words must be int32 words, got int64 of shape (6, 3, 3, 2)",
        filters=words(6, 3, 3, 2, dtype=torch.int64))
through("weight_words must be 3 words wide for 70 channels, got int32 of shape (6, 3, 3, 2)",
        channels=70)
through("weight_words must be on cpu as the first argument, got meta",
        filters=words(6, 3, 3, 2, device="meta"))
through("dtype must be float16 or bfloat16, got torch.float32", dtype=torch.float32)
through("scale must be None for a grad in float8, got float32 of shape (6,)", scale=real(6))
through("scale must be of shape (6,), got float32 of shape (5,)",
        real(2, 6, 5, 5, dtype=HALF), scale=real(5))
through("input must be float32, float16 or bfloat16 of shape (2, 37, 5, 5), got float64 of shape "
        "(2, 37, 5, 5)", x=IMAGE.double())
through("input must be float32, float16 or bfloat16 of shape (2, 37, 5, 5), got float16 of shape "
        "(2, 37, 5, 4)", x=IMAGE[..., :4])
through("shift must be None without an input, got float32 of shape (37,)", shift=real(37))
through("add must be None without an input, got float16 of shape (2, 37, 5, 5)", add=IMAGE)
through("estimator must be identity without an input, got 'ste_sign'", estimator="ste_sign")
through("padding must be at least 0, got [-1]", padding=(-1,))
through("dilation must be at least 1, got [0]", dilation=(0,))
through("scale must not require grad, this operator has no gradient; use binary_conv2d or "
        "binary_linear to train, or .detach()", scale=grad(6))


def pool(text, *args, x=TRAIN[0], **kw):
    row(ops.max_pool2d_with_offsets.default, text, x, *args, **kw)


POOLED = real(2, 6, 2, 2), words(2, 6, 2, 2, dtype=torch.uint8)


def pool_grad(text, *args, g=POOLED[0], offsets=POOLED[1]):
    row(ops.max_pool2d_with_offsets_backward.default, text, g, offsets, *args)


pool(f"input must be {FLOATS}, got int32 of shape (2, 6, 5, 5)", (2,), x=words(2, 6, 5, 5))
pool("input must be 4-dimensional, got float32 of shape (6, 5, 5)", (2,), x=TRAIN[0][0])
pool("kernel_size must be of at most 255 taps, which a byte tells apart, got [16, 16]", (16, 16),
     x=real(2, 6, 20, 20))
pool("kernel_size must be at most the padded input size 5, got a reach of 6", (6,))
pool("padding must be at most half of kernel_size, got [2, 2]", (3,), (1,), (2,))
pool("stride must be at least 1, got [0, 0]", (2,), (0, 0))
pool_grad(f"grad must be {FLOATS}, got int32 of shape (2, 6, 2, 2)", (5, 5), (2,),
          g=words(2, 6, 2, 2))
pool_grad("grad must be of shape (2, 6, 3, 2), got float32 of shape (2, 6, 2, 2)", (6, 5), (2,))
pool_grad("offsets must be uint8 of shape (2, 6, 2, 2), got int32 of shape (2, 6, 2, 2)", (5, 5),
          (2,), offsets=words(2, 6, 2, 2))
pool_grad("offsets must be uint8 of shape (2, 6, 2, 2), got uint8 of shape (2, 6, 2, 1)", (5, 5),
          (2,), offsets=words(2, 6, 2, 1, dtype=torch.uint8))
pool_grad("offsets must be on cpu as the first argument, got meta", (5, 5), (2,),
          offsets=words(2, 6, 2, 2, dtype=torch.uint8, device="meta"))
pool_grad("input_size must be (H, W) of the input, got [-1, 5]", (-1, 5), (2,))
