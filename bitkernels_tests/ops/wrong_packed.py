"""Wrong arguments of the operators on bits, by hand."""

from __future__ import annotations

import torch

from bitkernels_tests.ops.wrong import FLOATS, grad, real, row, words

ops = torch.ops.bitkernels
CONV = words(2, 5, 6, 2), words(8, 3, 3, 2)
LINEAR = words(3, 2), words(8, 2)


def conv(text, *args, x=CONV[0], w=CONV[1], channels=40, **kw):
    row(ops.packed_conv2d.default, text, x, w, channels, *args, **kw)


def conv_packed(text, **kw):
    row(ops.packed_conv2d.packed, text, *CONV, 40, **kw)


def linear(text, *args, x=LINEAR[0], w=LINEAR[1], channels=40, **kw):
    row(ops.packed_linear.default, text, x, w, channels, *args, **kw)


def pool(text, *args, x=CONV[0], **kw):
    row(ops.packed_max_pool2d.default, text, x, *args, **kw)


def moments(text, *args, x=CONV[0], w=CONV[1], channels=40, **kw):
    row(ops.packed_conv2d_moments.default, text, x, w, channels, *args, **kw)


def packed_transposed(text, *args, x=CONV[0], w=CONV[1], channels=40, **kw):
    row(ops.packed_conv_transpose2d.default, text, x, w, channels, *args, **kw)


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
conv("weight_words must be of less than 2^31 products in a sum, got int32 of shape "
     "(1, 32768, 65536, 1)", (1,), (32768,), channels=1, x=words(1, 1, 1, 1),
     w=words(1, 1, 1, 1).expand(1, 2**15, 2**16, 1))
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
linear("weight_words must be of less than 2^31 products in a sum, got int32 of shape (1, 67108864)",
       channels=2**31, x=words(1, 1).expand(1, 2**26), w=words(1, 1).expand(1, 2**26))
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

moments("words must be int32 words, got float32 of shape (2, 5, 6, 2)", x=real(2, 5, 6, 2))
moments("words must be 3 words wide for 70 channels, got int32 of shape (2, 5, 6, 2)", channels=70)
moments("groups must be a divisor of 40 input and 8 output channels, got 3", (1,), (0,), (1,), 3)
moments("stride must be at least 1, got [0, 1]", (0, 1))
moments("kernel must be at most the padded input size 5, got a reach of 7", (1,), (0,), (3,))
moments("pad_value must be -1, 0 or 1, got 2", pad_value=2)
moments("out_channels must be 8, the first size of weight_words, got 9", out_channels=9)

row(ops.packed_conv2d_recompute.default,
    "grad must be of shape (2, 8, 3, 4), got float32 of shape (2, 8, 4, 3)", real(2, 8, 4, 3),
    *CONV, 40)
