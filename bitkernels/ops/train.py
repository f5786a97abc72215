"""The differentiable operators, and what their forward and backward run."""

_ESTIMATORS = """\
  scale: (Cout,) real, a factor of each output channel; None: none.
  input_estimator: the slope of the input's sign in the backward: ste_sign, approx_sign,
    swish_sign, identity or none.
  input_clip: of ste_sign: the slope is 1 where |input| <= input_clip; None: everywhere.
  weight_estimator: the same for the weight.
  weight_clip: the same for the weight.
  beta: of swish_sign.
  scale_weight_grad: multiply the weight's gradient with scale too.
  dtype: of the result; None: the input's.
"""

TEXTS = {
    "binary_conv2d": f"""
Convolution of sign(input) with sign(weight), with gradients by estimators. The overload .padding
takes "same" and "valid".

Forward: both are packed, convolved in integers and multiplied by scale, plus bias, in float32.
Backward: 2 bits are kept for each input value; approx_sign and swish_sign keep the input.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, Cin, H, W) or (Cin, H, W).
  weight: real (Cout, Cin / groups, kh, kw), the latent weights.
  bias: (Cout,) real; None: none.
  stride: one or two integers, at least 1.
  padding: one, two or four integers, as of packed_conv2d; .padding: "same" or "valid".
  dilation: one or two integers, at least 1.
  groups: a divisor of both numbers of channels.
  pad_value: 0, or the sign -1 or 1 that the padding is.
{_ESTIMATORS}Returns:
  real (N, Cout, OH, OW) or (Cout, OH, OW).
Errors:
  an input with another number of channels than the weight takes, integers, other shapes, unknown
  estimators, a clip below 0, devices that differ.
Example:
  >>> x = torch.randn(1, 16, 8, 8, requires_grad=True)
  >>> weight = torch.randn(8, 16, 3, 3, requires_grad=True)
  >>> y = ops.binary_conv2d(x, weight, padding=1)
  >>> y.sum().backward()
  >>> y.shape, x.grad.shape, weight.grad.shape
  (torch.Size([1, 8, 8, 8]), torch.Size([1, 16, 8, 8]), torch.Size([8, 16, 3, 3]))
""",
    "binary_conv_transpose2d": f"""
Transposed convolution of sign(input) with sign(weight), with gradients by estimators; as
binary_conv2d. Geometric arguments are those of torch.nn.functional.conv_transpose2d, in its order.

Pixels of the output that no tap reaches are the bias.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, Cin, H, W) or (Cin, H, W).
  weight: real (Cin, Cout / groups, kh, kw), the latent weights.
  bias: (Cout,) real; None: none.
  stride: one or two integers, at least 1.
  padding: one or two integers, at least 0: rows and columns taken away at each side.
  output_padding: one or two integers, smaller than stride or dilation: rows and columns more.
  groups: a divisor of both numbers of channels.
  dilation: one or two integers, at least 1.
{_ESTIMATORS}Returns:
  real (N, Cout, OH, OW) or (Cout, OH, OW), with
  OH = (H - 1) stride - 2 padding + dilation (kh - 1) + output_padding + 1.
Errors:
  an input with another number of channels than the weight takes, integers, other shapes, an output
  without pixels, unknown estimators, a clip below 0, devices that differ.
Example:
  >>> x = torch.randn(1, 16, 4, 4, requires_grad=True)
  >>> weight = torch.randn(16, 8, 2, 2, requires_grad=True)
  >>> y = ops.binary_conv_transpose2d(x, weight, stride=2)
  >>> sign = lambda t: torch.where(t < 0, -1.0, 1.0)
  >>> torch.equal(y, F.conv_transpose2d(sign(x), sign(weight), stride=2))
  True
""",
    "binary_linear": f"""
sign(input) times the transpose of sign(weight), with gradients by estimators; as binary_conv2d.

Arguments:
  input: float32, float16, bfloat16 or float64, (..., in).
  weight: real (out, in), the latent weights.
  bias: (out,) real; None: none.
{_ESTIMATORS}Returns:
  real (..., out).
Errors:
  an input of another width than the weight, integers, unknown estimators, a clip below 0, devices
  that differ.
Example:
  >>> x = torch.randn(4, 100, requires_grad=True)
  >>> ops.binary_linear(x, torch.randn(10, 100)).sum().backward()
  >>> bool((x.grad[x.abs() > 1] == 0).all())
  True
""",
    "binary_conv2d_forward": """
What binary_conv2d runs: its output, and the packed signs and mask that its backward keeps.

Arguments:
  input: real (N, Cin, H, W).
  weight: real (Cout, Cin / groups, kh, kw).
  bias: (Cout,) real or None.
  scale: (Cout,) real or None.
  stride: two integers.
  padding: one, two or four integers.
  dilation: two integers.
  groups: a divisor of both numbers of channels.
  pad_value: -1, 0 or 1.
  clip: of the mask |input| <= clip; None: no mask, which is then empty.
  dtype: of the output.
  channels_last: the memory format of the output.
Returns:
  (output (N, Cout, OH, OW), signs int32 (N, H, W, words), mask int32, like signs or empty).
Errors:
  those of binary_conv2d; tensors that require a gradient.
Example:
  >>> x, weight = torch.randn(1, 16, 8, 8), torch.randn(8, 16, 3, 3)
  >>> y, signs, mask = ops.binary_conv2d_forward(
  ...     x, weight, None, None, (1, 1), (1, 1), (1, 1), 1, 0, 1.0, torch.float32, False)
  >>> y.shape, signs.shape, mask.shape
  (torch.Size([1, 8, 8, 8]), torch.Size([1, 8, 8, 1]), torch.Size([1, 8, 8, 1]))
""",
    "rsign": """
sign(input + shift) with a learned shift: ReActNet's RSign. Differentiable in both.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, C, ...).
  shift: real (C,), or (N, C, 1, ..., 1): one a channel of each sample.
  estimator: the slope in the backward: ste_sign, approx_sign, swish_sign, identity or none.
  clip: of ste_sign; None: no limit.
  beta: of swish_sign.
Returns:
  -1 and +1, the shape and dtype of input; +1 unless input + shift < 0.
Errors:
  an input with another number of channels than the shift, a shift of another shape, fewer than two
  dimensions, integers, an unknown estimator.
Example:
  >>> ops.rsign(torch.tensor([[0.5, -0.5]]), torch.tensor([-1.0, 1.0])).tolist()
  [[-1.0, 1.0]]
""",
    "rprelu": """
A PReLU between two learned shifts: ReActNet's RPReLU. Differentiable in all arguments.

With y = input + shift_in: y + shift_out where y > 0, else slope y + shift_out.

Arguments:
  input: float32, float16, bfloat16 or float64, (N, C, ...).
  shift_in: real (C,).
  slope: real (C,), also 0 or negative.
  shift_out: real (C,).
Returns:
  the shape and dtype of input.
Errors:
  an input with another number of channels than the vectors, fewer than two dimensions, integers.
Example:
  >>> zero, slope = torch.zeros(2), torch.full((2,), 0.25)
  >>> ops.rprelu(torch.tensor([[-4.0, 3.0]]), zero, slope, zero).tolist()
  [[-1.0, 3.0]]
""",
    "rprelu_backward": """
The gradients of rprelu.

Arguments:
  grad: of the output, the shape and dtype of input.
  input: as of rprelu.
  shift_in: as of rprelu.
  slope: as of rprelu.
Returns:
  the gradients of input, shift_in, slope and shift_out; the vectors' are float32 (C,).
Errors:
  those of rprelu; a grad of another shape or dtype.
Example:
  >>> x, zero, slope = torch.tensor([[-4.0, 3.0]]), torch.zeros(2), torch.full((2,), 0.25)
  >>> ops.rprelu_backward(torch.ones(1, 2), x, zero, slope)[0].tolist()
  [[0.25, 1.0]]
""",
    "sign_backward": """
A gradient times the slope of a sign's estimator, plus another gradient; and its sum per channel.

Arguments:
  grad: of the sign, real (N, C, ...).
  input: of the sign, real, the shape of grad.
  shift: real (C,), added to input; None: none.
  add: the shape and dtype of input, added to the result; None: none.
  estimator: ste_sign, approx_sign, swish_sign or identity.
  clip: of ste_sign; None: no limit.
  beta: of swish_sign.
Returns:
  (gradient in the dtype of input, float64 (C,): sums of grad times slope, the shift's gradient).
Errors:
  shapes or types that differ, an unknown estimator, a clip below 0.
Example:
  >>> grad, sums = ops.sign_backward(torch.ones(1, 2), torch.tensor([[0.5, 2.0]]))
  >>> grad.tolist(), sums.tolist()
  ([[1.0, 0.0]], [1.0, 0.0])
""",
}
