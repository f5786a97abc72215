// torch.ops.bitkernels.packed_conv2d_input_grad and _weight_grad on CPU tensors: checks and
// allocation around cpu/packed_conv2d_input_grad.h and cpu/packed_conv2d_weight_grad.h.
#include <torch/csrc/stable/ops.h>

#include "box.h"
#include "cpu/packed_conv2d_input_grad.h"
#include "cpu/packed_conv2d_weight_grad.h"
#include "tensors.h"

namespace bitkernels {
namespace {

// A convolution's shape; the operands are not read.
Conv geometry(const char* op, const Tensor& grad, int64_t n, int64_t h, int64_t w, int64_t channels,
              std::pair<int64_t, int64_t> kernel, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation) {
  check_real(op, "grad", grad);
  if (grad.dim() != 4 || grad.scalar_type() == ScalarType::Double)
    fail(op, "grad", "float32, float16 or bfloat16 of shape (N, Cout, OH, OW)", describe(grad));
  const auto [sh, sw] = pair(op, "stride", stride, 1);
  const auto [dh, dw] = pair(op, "dilation", dilation, 1);
  const Padding pad = padding4(op, padding);
  const auto [kh, kw] = kernel;
  Conv conv = {};
  conv.batch = n;
  conv.height = h;
  conv.width = w;
  conv.groups = 1;
  conv.channels = channels;
  conv.out_channels = grad.size(1);
  conv.kh = kh;
  conv.kw = kw;
  conv.stride_h = sh;
  conv.stride_w = sw;
  conv.top = pad.top;
  conv.bottom = pad.bottom;
  conv.left = pad.left;
  conv.right = pad.right;
  conv.dilation_h = dh;
  conv.dilation_w = dw;
  conv.out_h = conv_output_size(op, h, pad.top, pad.bottom, kh, sh, dh);
  conv.out_w = conv_output_size(op, w, pad.left, pad.right, kw, sw, dw);
  if (grad.size(0) != n || grad.size(2) != conv.out_h || grad.size(3) != conv.out_w)
    fail(op, "grad",
         text("of shape ", shape_text(Sizes{n, conv.out_channels, conv.out_h, conv.out_w})),
         describe(grad));
  return conv;
}

Tensor op_weight_grad(Tensor grad, Tensor words, int64_t channels, Sizes kernel_size, Sizes stride,
                      Sizes padding, Sizes dilation, int64_t pad_value) {
  const char* op = "packed_conv2d_weight_grad";
  check_words(op, "words", words, channels, 4);
  if (pad_value < -1 || pad_value > 1) fail(op, "pad_value", "-1, 0 or 1", text(pad_value));
  Conv conv = geometry(op, grad, words.size(0), words.size(1), words.size(2), channels,
                       pair(op, "kernel_size", kernel_size, 1), stride, padding, dilation);
  const Tensor in = dense(words), g = as_rows(grad);
  conv.pad_value = static_cast<int>(pad_value);
  conv.input = words_of(in);
  const int64_t taps = conv.kh * conv.kw;
  Tensor out = empty_strided({conv.out_channels, channels, conv.kh, conv.kw},
                             {channels * taps, 1, conv.kw * channels, channels}, ScalarType::Float);
  if (out.numel() > 0)
    packed_conv2d_weight_grad(kernel(), conv, g.const_data_ptr(), dtype_of(g.scalar_type()),
                              static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor op_input_grad(Tensor grad, Tensor weight_words, int64_t channels, OptTensor scale,
                     Sizes input_size, Sizes padding, Sizes dilation) {
  const char* op = "packed_conv2d_input_grad";
  check_words(op, "weight_words", weight_words, channels, 4);
  if (grad.dim() != 4 || grad.size(1) != weight_words.size(0))
    fail(op, "grad", text("of shape (N, ", weight_words.size(0), ", OH, OW)"), describe(grad));
  check_channel_vector(op, "scale", scale, grad.size(1));
  const auto [h, w] = pair(op, "input_size", input_size, 1);
  const Conv conv = geometry(op, grad, grad.size(0), h, w, channels,
                             {weight_words.size(1), weight_words.size(2)}, {1}, padding, dilation);
  const Tensor weight = dense(weight_words), g = as_rows(grad);
  const WideVector factors(scale, false);
  Tensor out = empty_strided({conv.batch, channels, h, w},
                             {h * w * channels, 1, w * channels, channels}, g.scalar_type());
  if (out.numel() > 0)
    packed_conv2d_input_grad(kernel(), conv, words_of(weight), factors.floats(), g.const_data_ptr(),
                             dtype_of(g.scalar_type()), out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl(BOX("packed_conv2d_weight_grad", &bitkernels::op_weight_grad));
  m.impl(BOX("packed_conv2d_input_grad", &bitkernels::op_input_grad));
}
