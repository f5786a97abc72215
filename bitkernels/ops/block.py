"""The residual block in training, and its passes."""

TEXTS = {
    "binary_residual_block": """
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
""",
    "residual_block_forward": """
The pass of a residual block after its convolution: RPReLU(dot scale + bias + residual).

Arguments:
  dot: int16 or int32 (N, C, H, W), from packed_conv2d_moments.
  residual: real, the shape of dot.
  scale: real (C,).
  bias: real (C,).
  shift_in: real (C,) or None.
  slope: real (C,) or None: no activation.
  shift_out: real (C,) or None.
  relu: take max(dot, 0).
Returns:
  the shape and dtype of residual, channels-last.
Errors:
  shapes, types or devices that do not fit; tensors that require a gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero = torch.ones(2), torch.zeros(2)
  >>> x = torch.ones(1, 2, 1, 1)
  >>> y = ops.residual_block_forward(dot, x, one, zero, None, None, None, False)
  >>> y.flatten().tolist()
  [-2.0, 5.0]
""",
    "residual_block_backward": """
The first pass of a residual block's backward: the gradient of the value under the activation, and
sums for the gradients of the parameters.

Arguments:
  grad: real, the shape of dot.
  dot: int16 or int32 (N, C, H, W).
  residual: real, the shape of dot and dtype of grad; None without slope.
  scale: real (C,).
  bias: real (C,).
  shift_in: real (C,) or None.
  slope: real (C,); None: no activation; the gradient is grad, and an empty tensor stands for it.
  center: real (C,), subtracted from dot in the sums.
  relu: take max(dot, 0).
Returns:
  (gradient, float64 (4, C): sums of it, of it times dot - center, of the slope's gradient, and of
  grad).
Errors:
  shapes, types or devices that do not fit, a slope without residual; tensors that require a
  gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero, grad = torch.ones(2), torch.zeros(2), torch.ones(1, 2, 1, 1)
  >>> _, sums = ops.residual_block_backward(grad, dot, None, one, zero, None, None, zero, False)
  >>> sums[:2].tolist()
  [[1.0, 1.0], [-3.0, 4.0]]
""",
    "residual_block_norm_backward": """
The second pass of a residual block's backward: p grad + q (dot - center) + r, per channel.

Arguments:
  grad: real, the shape of dot.
  dot: int16 or int32 (N, C, H, W).
  p: real (C,).
  q: real (C,).
  r: real (C,).
  center: real (C,).
  relu: take max(dot, 0), and 0 where dot <= 0.
  dtype: of the result, float64 for float64 only.
Returns:
  dtype, the shape of dot, channels-last.
Errors:
  shapes, types or devices that do not fit; tensors that require a gradient.
Example:
  >>> dot = torch.tensor([-3, 4], dtype=torch.int16).view(1, 2, 1, 1)
  >>> one, zero, grad = torch.ones(2), torch.zeros(2), torch.ones(1, 2, 1, 1)
  >>> out = ops.residual_block_norm_backward(
  ...     grad, dot, one, one, zero, zero, False, torch.float32)
  >>> out.flatten().tolist()
  [-2.0, 5.0]
""",
}
