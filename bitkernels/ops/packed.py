"""Products of words: convolution and linear layer."""

_EPILOGUE = """\
  clamp_min: lower bound of the dot products, before everything else; None: none.
  clamp_max: upper bound.
  scale: (Cout,) real, a factor; with bias a folded batch norm.
  bias: (Cout,) real, added after scale.
  residual: real, of the output's shape, added next.
  shift_in: (Cout,) real, added next; with shift_out it needs slope.
  slope: (Cout,) real, the factor of what is not above 0 then.
  shift_out: (Cout,) real, added last.
"""
_OUTPUTS = """\
  dtype: of the real output: float32 (None), float16, bfloat16, float64; int32: the dot products
    themselves, without epilogue.
"""
_PACKED = """\
  sign_shift: (Cout,) real, added before the sign of a packed output.
  threshold: int32 (2, Cout) from bitkernels.fold_threshold, alone: the bit is 1 where
    threshold[0] <= dot <= threshold[1].
"""

TEXTS = {
    "packed_conv2d": f"""
Convolution of packed activations with packed filters: dot products of signs, exact in int32, then
an epilogue in float32. The overload .packed gives the packed signs of the result, .both gives both.

dot = K - 2 popcount(a xor w), with the K taps inside the image. The epilogue, each part optional,
one rounding a step: clamp, times scale plus bias, plus residual, RPReLU (shift_in, slope,
shift_out), then the sign with sign_shift or the cast to dtype.

Arguments:
  words: int32 (N, H, W, ceil(channels / 32)), the packed input.
  weight_words: int32 (Cout, kh, kw, ceil(channels / groups / 32)), or the same by tile_weight.
  channels: of the input; words alone cannot tell.
  stride: one or two integers, at least 1.
  padding: one, two (height, width) or four (top, bottom, left, right) integers, at least 0.
  dilation: one or two integers, at least 1.
  groups: a divisor of the input's and the output's channels.
  pad_value: 0: padding contributes nothing, as in nn.Conv2d; -1 or 1: it is that sign.
  out_channels: Cout, needed for tiled filters where it is no multiple of 16.
{_EPILOGUE}{_OUTPUTS}  channels_last: the memory format of the real output.
{_PACKED}Returns:
  real (N, Cout, OH, OW); .packed: int32 (N, OH, OW, ceil(Cout / 32)); .both: the two.
Errors:
  a RuntimeError that names the argument for words of the wrong type, rank or width, filters, sizes
  and vectors that do not fit, a threshold with other parts of the epilogue, an argument that
  requires a gradient: there is none, binary_conv2d trains.
Example:
  >>> x, weight = torch.randn(1, 64, 8, 8), torch.randn(40, 64, 3, 3)
  >>> words, filters = ops.sign_pack(x, dim=1), ops.sign_pack(weight, dim=1)
  >>> y = ops.packed_conv2d(words, filters, 64, padding=1)
  >>> sign = lambda t: torch.where(t < 0, -1.0, 1.0)
  >>> torch.equal(y, F.conv2d(sign(x), sign(weight), padding=1))
  True
  >>> ops.packed_conv2d.packed(words, filters, 64, padding=1).shape
  torch.Size([1, 8, 8, 2])
""",
    "packed_conv_transpose2d": f"""
Transposed convolution of packed activations with packed filters: dot products of signs, exact in
int32, times scale plus bias in float32. Runs packed_conv2d for each phase of the output.

Arguments:
  words: int32 (N, H, W, ceil(channels / 32)), the packed input.
  weight_words: int32 (Cout, kh, kw, ceil(channels / groups / 32)), by output channel as of
    packed_conv2d; not tiled.
  channels: of the input; words alone cannot tell.
  stride: one or two integers, at least 1.
  padding: one or two integers, at least 0: rows and columns taken away at each side.
  output_padding: one or two integers, smaller than stride or dilation: rows and columns more.
  groups: a divisor of the input's and the output's channels.
  dilation: one or two integers, at least 1.
  scale: (Cout,) real, a factor.
  bias: (Cout,) real, added after scale.
{_OUTPUTS}  channels_last: the memory format of the output.
Returns:
  real (N, Cout, OH, OW), sizes as of binary_conv_transpose2d.
Errors:
  those of packed_conv2d; an output without pixels; an argument that requires a gradient: there is
  none, binary_conv_transpose2d trains.
Example:
  >>> x, weight = torch.randn(1, 64, 4, 4), torch.randn(64, 40, 3, 3)
  >>> words, filters = ops.sign_pack(x, dim=1), ops.sign_pack(weight.transpose(0, 1), dim=1)
  >>> y = ops.packed_conv_transpose2d(words, filters, 64, stride=2, padding=1)
  >>> sign = lambda t: torch.where(t < 0, -1.0, 1.0)
  >>> torch.equal(y, F.conv_transpose2d(sign(x), sign(weight), stride=2, padding=1))
  True
""",
    "packed_linear": f"""
A linear layer on words: dot products of signs, exact in int32, then an epilogue in float32. The
overload .packed gives the packed signs of the result, .both gives both.

The epilogue is that of packed_conv2d.

Arguments:
  words: int32 (..., ceil(channels / 32)), the packed input.
  weight_words: int32 (out, ceil(channels / 32)), or the same by tile_weight.
  channels: of the input.
  out_channels: out, needed for tiled weights where it is no multiple of 16.
{_EPILOGUE}{_OUTPUTS}{_PACKED}Returns:
  real (..., out); .packed: int32 (..., ceil(out / 32)); .both: the two.
Errors:
  those of packed_conv2d; binary_linear trains.
Example:
  >>> x, weight = torch.randn(5, 100), torch.randn(10, 100)
  >>> y = ops.packed_linear(ops.sign_pack(x), ops.sign_pack(weight), 100, dtype=torch.int32)
  >>> y.shape, y.dtype
  (torch.Size([5, 10]), torch.int32)
""",
    "packed_conv2d_moments": """
Dot products of packed_conv2d with their sums for batch statistics, in one pass.

Arguments:
  words: as of packed_conv2d.
  weight_words: as of packed_conv2d.
  channels: as of packed_conv2d.
  stride: as of packed_conv2d.
  padding: as of packed_conv2d.
  dilation: as of packed_conv2d.
  groups: as of packed_conv2d.
  pad_value: as of packed_conv2d.
  out_channels: as of packed_conv2d.
  relu: take the sums of max(dot, 0).
Returns:
  (dot, moments): dot (N, Cout, OH, OW), int16 where a dot product has fewer than 2^15 products,
  else int32, channels-last; moments int64 (3, Cout): sum, sum of squares, count.
Errors:
  those of packed_conv2d.
Example:
  >>> words = ops.sign_pack(torch.randn(2, 64, 8, 8), dim=1)
  >>> filters = ops.sign_pack(torch.randn(8, 64, 3, 3), dim=1)
  >>> dot, moments = ops.packed_conv2d_moments(words, filters, 64)
  >>> dot.dtype, torch.equal(moments[0], dot.sum((0, 2, 3)))
  (torch.int16, True)
""",
    "packed_conv2d_input_grad": """
Gradient of the input of a convolution of stride 1 and one group, from the gradient of its output
and the packed signs of its weight.

Arguments:
  grad: float32, float16 or bfloat16 (N, Cout, OH, OW).
  weight_words: int32 (Cout, kh, kw, ceil(channels / 32)).
  channels: of the input.
  scale: (Cout,) real, a factor of the weight; None: none.
  input_size: (H, W) of the input.
  padding: as of packed_conv2d, with zeros.
  dilation: one or two integers, at least 1.
Returns:
  (N, channels, H, W) in grad's dtype, channels-last.
Errors:
  a grad of another type or shape than the convolution's output, words and vectors that do not fit.
Example:
  >>> filters = ops.sign_pack(torch.randn(8, 32, 3, 3), dim=1)
  >>> grad = torch.randn(1, 8, 6, 6)
  >>> ops.packed_conv2d_input_grad(grad, filters, 32, None, (6, 6), padding=1).shape
  torch.Size([1, 32, 6, 6])
""",
    "packed_conv2d_weight_grad": """
Gradient of the signs of a convolution's weight, from the gradient of its output and the packed
signs of its input. One group.

Arguments:
  grad: float32, float16 or bfloat16 (N, Cout, OH, OW).
  words: int32 (N, H, W, ceil(channels / 32)).
  channels: of the input.
  kernel_size: (kh, kw).
  stride: one or two integers, at least 1.
  padding: as of packed_conv2d.
  dilation: one or two integers, at least 1.
  pad_value: as of packed_conv2d.
Returns:
  float32 (Cout, channels, kh, kw), channels-last.
Errors:
  a grad of another type or shape than the convolution's output, words that do not fit.
Example:
  >>> words = ops.sign_pack(torch.randn(1, 32, 6, 6), dim=1)
  >>> ops.packed_conv2d_weight_grad(torch.randn(1, 8, 4, 4), words, 32, 3).shape
  torch.Size([8, 32, 3, 3])
""",
}
