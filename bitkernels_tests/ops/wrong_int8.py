"""Wrong arguments of the int8 operators, by hand."""

from __future__ import annotations

import torch

from bitkernels_tests.ops.wrong import FLOATS, grad, real, row

ops = torch.ops.bitkernels


def int8(*shape):
    return torch.zeros(shape, dtype=torch.int8)


def conv(text, *geometry, x=None, w=None, scale=None, bias=None, steps=1.0, **kw):
    x = real(2, 6, 5, 4) if x is None else x
    w = int8(8, 6, 3, 3) if w is None else w
    row(ops.int8_conv2d.default, text, x, w, real(8) if scale is None else scale, bias, steps,
        *geometry, **kw)


def linear(text, x=None, w=None, scale=None, bias=None, steps=1.0):
    row(ops.int8_linear.default, text, real(2, 6) if x is None else x,
        int8(8, 6) if w is None else w, real(8) if scale is None else scale, bias, steps)


IMAGE, FILTERS = "input must be float32 of shape (N, Cin, H, W), got ", (
    "weight must be int8 of shape (Cout, Cin / groups, kh, kw), got ")
conv(IMAGE + "float64 of shape (2, 6, 5, 4)", x=real(2, 6, 5, 4, dtype=torch.float64))
conv(IMAGE + "float32 of shape (6, 5, 4)", x=real(6, 5, 4))
conv(FILTERS + "uint8 of shape (8, 6, 3, 3)", w=int8(8, 6, 3, 3).to(torch.uint8))
conv(FILTERS + "int8 of shape (8, 6)", w=int8(8, 6))
conv("weight must be 6 channels wide for 6 channels in groups of 1, got int8 of shape (8, 5, 3, 3)",
     w=int8(8, 5, 3, 3))
conv("weight must be 3 channels wide for 6 channels in groups of 2, got int8 of shape (8, 6, 3, 3)",
     groups=2)
for groups in (0, -1, 4):
    conv(f"groups must be a divisor of 6 input and 8 output channels, got {groups}", groups=groups)
conv("stride must be at least 1, got [1, 0]", (1, 0))
conv("padding must be at least 0, got [0, -1]", (1,), (0, -1))
conv("padding must be one, two (height, width) or four (top, bottom, left, right) integers, got "
     "[1, 1, 1]", (1,), (1, 1, 1))
conv("dilation must be one or two integers, got [1, 1, 1]", (1,), (0,), (1, 1, 1))
conv("kernel must be at most the padded input size 4, got a reach of 5", (1,), (0,), (1, 2))
conv("weight must be a filter of at least 1x1, got int8 of shape (8, 6, 3, 0)", w=int8(8, 6, 3, 0))
conv("weight must be of 1 to 132104 products a sum, got 132105", x=real(1, 132105, 1, 1),
     w=int8(8, 132105, 1, 1))
conv("weight must be of 1 to 132104 products a sum, got 0", x=real(1, 0, 3, 3), w=int8(8, 0, 1, 1))
conv("scale must be of shape (8,), got float32 of shape (7,)", scale=real(7))
conv(f"bias must be {FLOATS}, got int8 of shape (8,)", bias=int8(8))
conv("bias must be on cpu as the first argument, got meta", bias=real(8, device="meta"))
for steps, said in ((0.0, "0"), (-2.0, "-2"), (float("nan"), "nan"), (float("inf"), "inf"),
                    (1e39, "1e+39"), (1e-40, "1e-40")):
    conv(f"steps must be a positive float32 number, got {said}", steps=steps)
conv("scale must not require grad, this operator has no gradient; use binary_conv2d or "
     "binary_linear to train, or .detach()", scale=grad(8))

linear("input must be float32 of shape (..., in), got float32 of shape ()", x=real())
linear("input must be float32 of shape (..., in), got float16 of shape (2, 6)",
       x=real(2, 6, dtype=torch.float16))
linear("input must be 6 wide, got float32 of shape (2, 7)", x=real(2, 7))
linear("weight must be int8 of shape (out, in), got int8 of shape (8, 6, 1)", w=int8(8, 6, 1))
linear("weight must be of 1 to 132104 products a sum, got 132105", x=real(132105),
       w=int8(8, 132105))
linear("scale must be of shape (8,), got float32 of shape (8, 1)", scale=real(8, 1))
linear("steps must be a positive float32 number, got 0", steps=0.0)
