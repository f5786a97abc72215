// torch.ops.bitkernels.packed_conv2d*, packed_linear* and binary_conv2d_forward on CPU tensors:
// checks and allocation around cpu/packed_conv2d.h.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "box.h"
#include "cpu/packed_conv2d.h"
#include "words.h"

namespace bitkernels {
namespace {

// The epilogue's arguments as the schemas give them, one struct for all six entry points.
struct Parts {
  OptFloat clamp_min, clamp_max;
  OptTensor scale, bias, residual, shift_in, slope, shift_out;
  OptType dtype;
  OptTensor sign_shift, threshold;
};

bool has_real_part(const Parts& p) {
  return p.clamp_min || p.clamp_max || p.residual || p.scale || p.bias || p.shift_in || p.slope ||
         p.shift_out || p.sign_shift;
}

void check_epilogue(const char* op, const Parts& p, const Sizes& out_shape, int64_t cout) {
  check_channel_vector(op, "scale", p.scale, cout);
  check_channel_vector(op, "bias", p.bias, cout);
  check_channel_vector(op, "shift_in", p.shift_in, cout);
  check_channel_vector(op, "slope", p.slope, cout);
  check_channel_vector(op, "shift_out", p.shift_out, cout);
  check_channel_vector(op, "sign_shift", p.sign_shift, cout);
  if (p.clamp_min && std::isnan(*p.clamp_min)) fail(op, "clamp_min", "a number", "nan");
  if (p.clamp_max && std::isnan(*p.clamp_max)) fail(op, "clamp_max", "a number", "nan");
  if (!p.slope && (p.shift_in || p.shift_out))
    fail(op, "slope", "given with shift_in or shift_out", "None");
  if (p.residual) {
    check_cpu(op, "residual", *p.residual);
    check_real(op, "residual", *p.residual);
    const auto sizes = p.residual->sizes();
    if (Sizes(sizes.begin(), sizes.end()) != out_shape)
      fail(op, "residual", text("of shape ", tuple_text(out_shape)), describe(*p.residual));
  }
  if (p.dtype == ScalarType::Int) {
    if (has_real_part(p))
      fail(op, "dtype", "a real type when the epilogue has scale, bias, ...", "torch.int32");
  } else if (p.dtype && !is_real(*p.dtype)) {
    fail(op, "dtype", "float32, float16, bfloat16, float64 or int32",
         text("torch.", name_of(*p.dtype)));
  }
  if (p.threshold) {
    check_cpu(op, "threshold", *p.threshold);
    const auto sizes = p.threshold->sizes();
    if (p.threshold->scalar_type() != ScalarType::Int || sizes.size() != 2 || sizes[0] != 2 ||
        sizes[1] != cout)
      fail(op, "threshold", text("int32 of shape (2, ", cout, ")"), describe(*p.threshold));
    if (has_real_part(p)) fail(op, "threshold", "alone, without scale, bias, ...", "both");
  }
}

struct Outputs {
  OptTensor real, words;
};

// Allocates the outputs, fills in the epilogue and runs; `shape` is (N, C, H, W) or (..., C).
Outputs run(const char* op, const Conv& conv, const Parts& p, const Sizes& shape, bool image,
            bool channels_last, bool want_real, bool want_words) {
  const int64_t cout = conv.groups * conv.out_channels;
  check_epilogue(op, p, shape, cout);
  const Kernel& k = kernel();
  const WideVector scale(p.scale, false), bias(p.bias, false), shift_in(p.shift_in, false),
      slope(p.slope, false), shift_out(p.shift_out, false), sign_shift(p.sign_shift, false);
  Epilogue e;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  e.clamp = p.clamp_min || p.clamp_max;
  e.lo = static_cast<float>(p.clamp_min.value_or(-kInf));
  e.hi = static_cast<float>(p.clamp_max.value_or(kInf));
  e.scale = scale.floats();
  e.bias = bias.floats();
  e.shift_in = shift_in.floats();
  e.slope = slope.floats();
  e.shift_out = shift_out.floats();
  e.sign_shift = sign_shift.floats();
  std::vector<int32_t> thresholds;
  if (p.threshold) {
    const Tensor t = dense(*p.threshold);
    const auto* from = static_cast<const int32_t*>(t.const_data_ptr());
    thresholds.assign(2 * (cout + 32), 0);
    std::copy(from, from + cout, thresholds.begin());
    std::copy(from + cout, from + 2 * cout, thresholds.begin() + cout + 32);
    e.t_lo = thresholds.data();
    e.t_hi = thresholds.data() + cout + 32;
  }

  const int64_t hw = conv.out_h * conv.out_w;
  const Strides last = {hw * cout, 1, conv.out_w * cout, cout};
  const Strides planar = {hw * cout, hw, conv.out_w, 1};
  Strides out = last, residual = last;
  Outputs result;
  if (want_real) {
    const ScalarType type = p.dtype.value_or(ScalarType::Float);
    if (image && channels_last)
      result.real = empty_strided(shape, {last.n, last.c, last.h, last.w}, type);
    else
      result.real = empty(shape, type);
    if (image && !channels_last) out = planar;
    e.out = result.real->mutable_data_ptr();
    e.out_int = type == ScalarType::Int;
    e.out_type = dtype_of(type);
    e.out_channel = out.c;
  }
  OptTensor kept;  // keeps a dense copy of the residual alive
  if (p.residual) {
    kept = image ? *p.residual : dense(*p.residual);
    if (image) {
      const auto s = kept->strides();
      residual = {s[0], s[1], s[2], s[3]};
    }
    e.residual = kept->const_data_ptr();
    e.residual_type = dtype_of(kept->scalar_type());
    e.residual_channel = residual.c;
  }
  if (want_words) {
    Sizes packed = shape;
    if (image) packed = {shape[0], shape[2], shape[3], shape[1]};
    packed.back() = word_count(cout);
    result.words = empty(packed, ScalarType::Int);
    e.words = mutable_words(*result.words);
  }
  if (conv.batch * hw > 0 && cout > 0) packed_conv2d(k, conv, e, out, residual);
  return result;
}

// A checked convolution, and what keeps its operands alive.
struct CheckedConv {
  Tensor in, tiles;
  Conv conv;
  Sizes shape;  // (N, Cout, OH, OW)
};

CheckedConv checked_conv(const Tensor& words, const Tensor& weight_words, int64_t channels,
                         const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                         int64_t groups, int64_t pad_value, OptInt out_channels) {
  const char* op = "packed_conv2d";
  check_words(op, "words", words, channels, 4);
  const Filter f = check_filter(op, weight_words, 4, out_channels, groups);
  check_cpu(op, "weight_words", weight_words);
  const int64_t cout = f.out_channels;
  if (groups < 1 || channels % groups || cout % groups)
    fail(op, "groups", text("a divisor of ", channels, " input and ", cout, " output channels"),
         text(groups));
  const int64_t per_group = channels / groups;
  if (f.taps[2] != word_count(per_group))
    fail(op, "weight_words",
         text(word_count(per_group), " words wide for ", per_group, " channels per group"),
         describe(weight_words));
  if (pad_value < -1 || pad_value > 1) fail(op, "pad_value", "-1, 0 or 1", text(pad_value));
  const auto [sh, sw] = pair(op, "stride", stride, 1);
  const auto [dh, dw] = pair(op, "dilation", dilation, 1);
  const Padding pad = padding4(op, padding);
  const int64_t kh = f.taps[0], kw = f.taps[1];
  if (kh < 1 || kw < 1)
    fail(op, "weight_words", "a filter of at least 1x1", describe(weight_words));
  check_products(op, weight_words, static_cast<double>(kh) * kw * per_group);
  const int64_t n = words.size(0), h = words.size(1), w = words.size(2);
  const int64_t oh = conv_output_size(op, h, pad.top, pad.bottom, kh, sh, dh);
  const int64_t ow = conv_output_size(op, w, pad.left, pad.right, kw, sw, dw);
  check_padded(op, pad, oh, ow);
  const Tensor in = dense(words);
  const Tensor tiles = f.tiled ? dense(weight_words) : tiled(weight_words, cout, groups);
  const Conv conv = {n,
                     h,
                     w,
                     groups,
                     per_group,
                     cout / groups,
                     kh,
                     kw,
                     sh,
                     sw,
                     pad.top,
                     pad.bottom,
                     pad.left,
                     pad.right,
                     dh,
                     dw,
                     oh,
                     ow,
                     static_cast<int>(pad_value),
                     words_of(in),
                     words_of(tiles)};
  return {in, tiles, conv, {n, cout, oh, ow}};
}

Outputs conv2d(const Tensor& words, const Tensor& weight_words, int64_t channels,
               const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
               int64_t pad_value, OptInt out_channels, const Parts& parts, bool channels_last,
               bool want_real, bool want_words) {
  const CheckedConv c = checked_conv(words, weight_words, channels, stride, padding, dilation,
                                     groups, pad_value, out_channels);
  return run("packed_conv2d", c.conv, parts, c.shape, true, channels_last, want_real, want_words);
}

Outputs linear(const Tensor& words, const Tensor& weight_words, int64_t channels,
               OptInt out_channels, const Parts& parts, bool want_real, bool want_words) {
  const char* op = "packed_linear";
  check_words(op, "words", words, channels);
  const Filter f = check_filter(op, weight_words, 2, out_channels, 1);
  check_cpu(op, "weight_words", weight_words);
  if (f.taps[0] != word_count(channels))
    fail(op, "weight_words", text(word_count(channels), " words wide for ", channels, " channels"),
         describe(weight_words));
  check_products(op, weight_words, static_cast<double>(channels));
  Sizes shape(words.sizes().begin(), words.sizes().end());
  shape.back() = f.out_channels;
  const int64_t rows = words.numel() / word_count(channels);
  const Tensor in = dense(words);
  const Tensor tiles = f.tiled ? dense(weight_words) : tiled(weight_words, f.out_channels, 1);
  const Conv conv = {1, 1, rows, 1, channels,     f.out_channels, 1, 1, 1, 1, 0, 0, 0, 0, 1,
                     1, 1, rows, 0, words_of(in), words_of(tiles)};
  return run(op, conv, parts, shape, false, false, want_real, want_words);
}

#define BK_EPILOGUE_ARGS                                                                       \
  OptFloat clamp_min, OptFloat clamp_max, OptTensor scale, OptTensor bias, OptTensor residual, \
      OptTensor shift_in, OptTensor slope, OptTensor shift_out
#define BK_EPILOGUE clamp_min, clamp_max, scale, bias, residual, shift_in, slope, shift_out
#define BK_CONV_ARGS                                                                \
  Tensor words, Tensor weight_words, int64_t channels, Sizes stride, Sizes padding, \
      Sizes dilation, int64_t groups, int64_t pad_value, OptInt out_channels, BK_EPILOGUE_ARGS
#define BK_CONV \
  words, weight_words, channels, stride, padding, dilation, groups, pad_value, out_channels
#define BK_LINEAR_ARGS \
  Tensor words, Tensor weight_words, int64_t channels, OptInt out_channels, BK_EPILOGUE_ARGS
#define BK_LINEAR words, weight_words, channels, out_channels

Tensor op_conv2d(BK_CONV_ARGS, OptType dtype, bool channels_last) {
  return *conv2d(BK_CONV, {BK_EPILOGUE, dtype, {}, {}}, channels_last, true, false).real;
}
Tensor op_conv2d_packed(BK_CONV_ARGS, OptTensor sign_shift, OptTensor threshold) {
  return *conv2d(BK_CONV, {BK_EPILOGUE, {}, sign_shift, threshold}, true, false, true).words;
}
std::tuple<Tensor, Tensor> op_conv2d_both(BK_CONV_ARGS, OptType dtype, bool channels_last,
                                          OptTensor sign_shift) {
  const Outputs o =
      conv2d(BK_CONV, {BK_EPILOGUE, dtype, sign_shift, {}}, channels_last, true, true);
  return {*o.real, *o.words};
}
// Dot products as int16 where they fit, else int32; their sums, sums of squares and count.
std::tuple<Tensor, Tensor> op_conv2d_moments(Tensor words, Tensor weight_words, int64_t channels,
                                             Sizes stride, Sizes padding, Sizes dilation,
                                             int64_t groups, int64_t pad_value, OptInt out_channels,
                                             bool relu) {
  const CheckedConv c = checked_conv(words, weight_words, channels, stride, padding, dilation,
                                     groups, pad_value, out_channels);
  const Conv& conv = c.conv;
  const int64_t cout = c.shape[1], hw = conv.out_h * conv.out_w;
  Epilogue e;
  e.out_short = conv.kh * conv.kw * conv.channels <= std::numeric_limits<int16_t>::max();
  e.relu = relu;
  const Strides last = {hw * cout, 1, conv.out_w * cout, cout};
  Tensor dot = empty_strided(c.shape, {last.n, last.c, last.h, last.w},
                             e.out_short ? ScalarType::Short : ScalarType::Int);
  Tensor moments = empty({3, cout}, ScalarType::Long);
  e.out = dot.mutable_data_ptr();
  e.moments = static_cast<int64_t*>(moments.mutable_data_ptr());
  std::fill(e.moments, e.moments + 2 * cout, 0);
  std::fill(e.moments + 2 * cout, e.moments + 3 * cout, conv.batch * hw);
  if (conv.batch * hw > 0 && cout > 0) packed_conv2d(kernel(), conv, e, last, last);
  return {dot, moments};
}

std::tuple<Tensor, Tensor, Tensor> op_binary_conv2d_forward(Tensor input, Tensor weight,
                                                            OptTensor bias, OptTensor scale,
                                                            Sizes stride, Sizes padding,
                                                            Sizes dilation, int64_t groups,
                                                            int64_t pad_value, OptFloat clip,
                                                            ScalarType dtype, bool channels_last) {
  const char* op = "binary_conv2d";
  if (input.dim() != 4) fail(op, "input", "4-dimensional", describe(input));
  if (weight.dim() != 4) fail(op, "weight", "4-dimensional", describe(weight));
  if (weight.size(1) * groups != input.size(1))
    fail(op, "input",
         text(weight.size(1) * groups, " channels wide for a weight of shape ",
              tuple_text(weight.sizes()), groups > 1 ? text(" in ", groups, " groups") : ""),
         text(input.size(1), " channels in ", describe(input)));
  const auto [words, mask] = pack(op, input, clip, std::nullopt, 1);
  const Tensor weight_words = std::get<0>(pack(op, weight, std::nullopt, std::nullopt, 1));
  Parts parts;
  parts.scale = scale;
  parts.bias = bias;
  parts.dtype = dtype;
  const Outputs o = conv2d(words, weight_words, input.size(1), stride, padding, dilation, groups,
                           pad_value, std::nullopt, parts, channels_last, true, false);
  return {*o.real, words, mask ? *mask : empty({0}, ScalarType::Int)};
}
Tensor op_linear(BK_LINEAR_ARGS, OptType dtype) {
  return *linear(BK_LINEAR, {BK_EPILOGUE, dtype, {}, {}}, true, false).real;
}
Tensor op_linear_packed(BK_LINEAR_ARGS, OptTensor sign_shift, OptTensor threshold) {
  return *linear(BK_LINEAR, {BK_EPILOGUE, {}, sign_shift, threshold}, false, true).words;
}
std::tuple<Tensor, Tensor> op_linear_both(BK_LINEAR_ARGS, OptType dtype, OptTensor sign_shift) {
  const Outputs o = linear(BK_LINEAR, {BK_EPILOGUE, dtype, sign_shift, {}}, true, true);
  return {*o.real, *o.words};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl(BOX("packed_conv2d", &bitkernels::op_conv2d));
  m.impl(BOX("packed_conv2d.packed", &bitkernels::op_conv2d_packed));
  m.impl(BOX("packed_conv2d.both", &bitkernels::op_conv2d_both));
  m.impl(BOX("packed_conv2d_moments", &bitkernels::op_conv2d_moments));
  m.impl(BOX("binary_conv2d_forward", &bitkernels::op_binary_conv2d_forward));
  m.impl(BOX("packed_linear", &bitkernels::op_linear));
  m.impl(BOX("packed_linear.packed", &bitkernels::op_linear_packed));
  m.impl(BOX("packed_linear.both", &bitkernels::op_linear_both));
}
