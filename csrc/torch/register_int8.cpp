// torch.ops.bitkernels.int8_conv2d and int8_linear on CPU tensors: checks and allocation around
// cpu/int8_conv2d.h.
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "box.h"
#include "cpu/int8_conv2d.h"
#include "tensors.h"

namespace bitkernels {
namespace {

void check_operands(const char* op, const Tensor& input, const Tensor& weight, const char* input_is,
                    const char* weight_is, int64_t rank) {
  if (input.scalar_type() != ScalarType::Float || (rank == 4 ? input.dim() != 4 : input.dim() < 1))
    fail(op, "input", text("float32 of shape ", input_is), describe(input));
  if (weight.scalar_type() != ScalarType::Char || weight.dim() != rank)
    fail(op, "weight", text("int8 of shape ", weight_is), describe(weight));
  check_cpu(op, "weight", weight);
}

void check_rest(const char* op, const Tensor& weight, const Tensor& scale, const OptTensor& bias,
                double steps) {
  double products = 1;
  for (int64_t i = 1; i < weight.dim(); ++i) products *= static_cast<double>(weight.size(i));
  if (products < 1 || products > static_cast<double>(kMostInt8Products))
    fail(op, "weight", text("of 1 to ", kMostInt8Products, " products a sum"),
         text(static_cast<int64_t>(products)));
  check_channel_vector(op, "scale", scale, weight.size(0));
  check_channel_vector(op, "bias", bias, weight.size(0));
  using Limits = std::numeric_limits<float>;
  if (!(steps >= static_cast<double>(Limits::min()) && steps <= static_cast<double>(Limits::max())))
    fail(op, "steps", "a positive float32 number", text(steps));
}

// Runs a layer whose sizes are filled in.
void run(RealConv c, const Tensor& input, const Tensor& weight, const Tensor& scale,
         const OptTensor& bias, double steps, Tensor& out) {
  if (out.numel() == 0) return;
  const Int8Dot& dot = int8_dot(kernel());
  const Tensor filters = dense(weight);
  const WideVector scales(scale, false), biases(bias, false);
  Tensor arranged = empty({arranged_int8_size(dot, c)}, ScalarType::Int);
  Tensor quantized = empty({int8_input_size(dot, c)}, ScalarType::Int);
  auto* words = static_cast<int32_t*>(arranged.mutable_data_ptr());
  arrange_int8_conv2d(dot, c, static_cast<const int8_t*>(filters.const_data_ptr()), words);
  c.in_pixel = c.groups * c.channels;
  c.out_pixel = c.groups * c.out_channels;
  c.input = static_cast<const float*>(input.const_data_ptr());
  c.out = static_cast<float*>(out.mutable_data_ptr());
  c.bias = biases.floats();
  int8_conv2d(dot, {c, static_cast<float>(steps), words, scales.floats(),
                    static_cast<int32_t*>(quantized.mutable_data_ptr())});
}

Tensor op_int8_conv2d(Tensor input, Tensor weight, Tensor scale, OptTensor bias, double steps,
                      Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const char* op = "int8_conv2d";
  check_operands(op, input, weight, "(N, Cin, H, W)", "(Cout, Cin / groups, kh, kw)", 4);
  const int64_t channels = input.size(1), cout = weight.size(0);
  if (groups < 1 || channels % groups || cout % groups)
    fail(op, "groups", text("a divisor of ", channels, " input and ", cout, " output channels"),
         text(groups));
  if (weight.size(1) != channels / groups)
    fail(
        op, "weight",
        text(channels / groups, " channels wide for ", channels, " channels in groups of ", groups),
        describe(weight));
  const auto [sh, sw] = pair(op, "stride", stride, 1);
  const auto [dh, dw] = pair(op, "dilation", dilation, 1);
  const Padding pad = padding4(op, padding);
  RealConv c = {};
  c.kh = weight.size(2), c.kw = weight.size(3);
  if (c.kh < 1 || c.kw < 1) fail(op, "weight", "a filter of at least 1x1", describe(weight));
  c.batch = input.size(0), c.height = input.size(2), c.width = input.size(3);
  c.groups = groups, c.channels = channels / groups, c.out_channels = cout / groups;
  c.stride_h = sh, c.stride_w = sw, c.dilation_h = dh, c.dilation_w = dw;
  c.top = pad.top, c.left = pad.left;
  c.out_h = conv_output_size(op, c.height, pad.top, pad.bottom, c.kh, sh, dh);
  c.out_w = conv_output_size(op, c.width, pad.left, pad.right, c.kw, sw, dw);
  check_padded(op, pad, c.out_h, c.out_w);
  check_rest(op, weight, scale, bias, steps);
  const Tensor image = as_rows(input);
  Tensor out =
      empty_strided({c.batch, cout, c.out_h, c.out_w},
                    {c.out_h * c.out_w * cout, 1, c.out_w * cout, cout}, ScalarType::Float);
  run(c, image, weight, scale, bias, steps, out);
  return out;
}

Tensor op_int8_linear(Tensor input, Tensor weight, Tensor scale, OptTensor bias, double steps) {
  const char* op = "int8_linear";
  check_operands(op, input, weight, "(..., in)", "(out, in)", 2);
  Sizes shape(input.sizes().begin(), input.sizes().end());
  if (shape.back() != weight.size(1))
    fail(op, "input", text(weight.size(1), " wide"), describe(input));
  check_rest(op, weight, scale, bias, steps);
  RealConv c = {};  // an image of one row
  c.batch = c.height = c.out_h = 1;
  c.width = c.out_w = input.numel() / weight.size(1);
  c.groups = c.kh = c.kw = c.stride_h = c.stride_w = c.dilation_h = c.dilation_w = 1;
  c.channels = weight.size(1), c.out_channels = weight.size(0);
  shape.back() = c.out_channels;
  const Tensor in = dense(input);
  Tensor out = empty(shape, ScalarType::Float);
  run(c, in, weight, scale, bias, steps, out);
  return out;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl(BOX("int8_conv2d", &bitkernels::op_int8_conv2d));
  m.impl(BOX("int8_linear", &bitkernels::op_int8_linear));
}
