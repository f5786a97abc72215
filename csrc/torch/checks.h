// Argument checks on torch tensors, in the words of bitkernels/ops/_checks.py (the tests compare
// them).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace bitkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

[[noreturn]] inline void fail(const char* op, const char* arg, const std::string& takes,
                              const std::string& got) {
  throw std::runtime_error(text("bitkernels::", op, ": ", arg, " must be ", takes, ", got ", got));
}

inline std::string name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return text("dtype ", static_cast<int>(t));
  }
}

template <class List>
std::string shape_text(const List& sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + ")";
}
// As Python prints a tuple of one.
template <class List>
std::string tuple_text(const List& sizes) {
  return sizes.size() == 1 ? text("(", sizes[0], ",)") : shape_text(sizes);
}
template <class List>
std::string list_text(const List& list) {
  std::string s = shape_text(list);
  s.front() = '[';
  s.back() = ']';
  return s;
}

inline std::string describe(const Tensor& t) {
  return text(name_of(t.scalar_type()), " of shape ", tuple_text(t.sizes()));
}

inline bool is_real(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16 ||
         t == ScalarType::Double;
}

inline DType dtype_of(ScalarType t) {
  return t == ScalarType::Half       ? DType::kF16
         : t == ScalarType::BFloat16 ? DType::kBF16
         : t == ScalarType::Double   ? DType::kF64
                                     : DType::kF32;
}

inline int64_t word_count(int64_t channels) { return (channels + 31) / 32; }

inline void check_cpu(const char* op, const char* arg, const Tensor& t) {
  if (!t.is_cpu()) fail(op, arg, "on cpu as the first argument", "another device");
}

inline void check_real(const char* op, const char* arg, const Tensor& t) {
  if (!is_real(t.scalar_type()))
    fail(op, arg, "float32, float16, bfloat16 or float64", describe(t));
}

inline void check_words(const char* op, const char* arg, const Tensor& t, int64_t channels,
                        int64_t ndim = -1) {
  check_cpu(op, arg, t);
  if (t.scalar_type() != ScalarType::Int) fail(op, arg, "int32 words", describe(t));
  if (ndim >= 0 && t.dim() != ndim) fail(op, arg, text(ndim, "-dimensional"), describe(t));
  if (channels < 1) fail(op, "channels", "at least 1", text(channels));
  if (t.dim() < 1 || t.size(t.dim() - 1) != word_count(channels))
    fail(op, arg, text(word_count(channels), " words wide for ", channels, " channels"),
         describe(t));
}

inline void check_channel_vector(const char* op, const char* arg, const std::optional<Tensor>& t,
                                 int64_t channels) {
  if (!t) return;
  check_cpu(op, arg, *t);
  check_real(op, arg, *t);
  if (t->dim() != 1 || t->size(0) != channels)
    fail(op, arg, text("of shape (", channels, ",)"), describe(*t));
}

// The number of samples that have shifts of their own: 1 for a shift (C,), input.size(0) for one of
// the input's rank, 1 but in dimension 0 and `dim`.
inline int64_t check_shift(const char* op, const Tensor& input, const std::optional<Tensor>& shift,
                           int64_t dim) {
  if (!shift) return 1;
  check_cpu(op, "shift", *shift);
  check_real(op, "shift", *shift);
  const int64_t channels = input.size(dim), n = input.dim();
  if (shift->dim() == 1 && shift->size(0) == channels) return 1;
  std::vector<int64_t> each(n, 1);
  each[0] = input.size(0);
  each[dim] = channels;
  bool fits = dim != 0 && shift->dim() == n;
  for (int64_t i = 0; fits && i < n; ++i) fits = shift->size(i) == each[i];
  const std::string takes = text("of shape (", channels, ",)");
  if (!fits)
    fail(op, "shift", dim == 0 ? takes : text(takes, " or ", tuple_text(each)), describe(*shift));
  return input.size(0);
}

constexpr int64_t kIntMax = (int64_t{1} << 31) - 1;

inline int64_t normalize_dim(const char* op, const Tensor& t, int64_t dim) {
  const int64_t n = t.dim();
  if (dim < -n || dim >= n) fail(op, "dim", text("in [", -n, ", ", n - 1, "]"), text(dim));
  return dim < 0 ? dim + n : dim;
}

inline std::pair<int64_t, int64_t> pair(const char* op, const char* arg,
                                        const std::vector<int64_t>& v, int64_t minimum) {
  if (v.size() != 1 && v.size() != 2) fail(op, arg, "one or two integers", list_text(v));
  if (v.front() < minimum || v.back() < minimum)
    fail(op, arg, text("at least ", minimum), list_text(v));
  if (v.front() > kIntMax || v.back() > kIntMax) fail(op, arg, "below 2^31", list_text(v));
  return {v.front(), v.back()};
}

struct Padding {
  int64_t top, bottom, left, right;
};

inline Padding padding4(const char* op, const std::vector<int64_t>& v) {
  if (v.size() != 1 && v.size() != 2 && v.size() != 4)
    fail(op, "padding", "one, two (height, width) or four (top, bottom, left, right) integers",
         list_text(v));
  for (int64_t p : v)
    if (p < 0) fail(op, "padding", "at least 0", list_text(v));
  for (int64_t p : v)
    if (p > kIntMax) fail(op, "padding", "below 2^31", list_text(v));
  if (v.size() == 4) return {v[0], v[1], v[2], v[3]};
  return {v.front(), v.front(), v.back(), v.back()};
}

inline int64_t conv_output_size(const char* op, int64_t size, int64_t before, int64_t after,
                                int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t padded = size + before + after, reach = dilation * (kernel - 1) + 1;
  if (padded < reach)
    fail(op, "kernel", text("at most the padded input size ", padded), text("a reach of ", reach));
  return (padded - reach) / stride + 1;
}

inline void check_padded(const char* op, const Padding& pad, int64_t oh, int64_t ow) {
  const int64_t most = std::max({pad.top, pad.bottom, pad.left, pad.right});
  if (most > int64_t{1} << 20 && static_cast<double>(oh) * ow > 0x1p40)
    fail(op, "padding", "such that the output has at most 2^40 pixels", text(oh, " x ", ow));
}

// Sums are int32.
inline void check_products(const char* op, const Tensor& weight_words, double products) {
  if (products > kIntMax)
    fail(op, "weight_words", "of less than 2^31 products in a sum", describe(weight_words));
}

// Output channels and rank of canonical or tiled filter words.
struct Filter {
  bool tiled;
  int64_t out_channels;
  std::vector<int64_t> taps;  // (kh, kw, words) or (words,)
};

inline Filter check_filter(const char* op, const Tensor& w, int64_t canonical,
                           std::optional<int64_t> out_channels, int64_t groups) {
  if (w.scalar_type() != ScalarType::Int) fail(op, "weight_words", "int32 words", describe(w));
  const auto sizes = w.sizes();
  Filter f;
  f.tiled = w.dim() == canonical + 1;
  if (f.tiled ? sizes[canonical] != kTile : w.dim() != canonical)
    fail(op, "weight_words", text(canonical, "-dimensional, or tiled by tile_weight"), describe(w));
  f.taps.assign(sizes.begin() + 1, sizes.begin() + canonical);
  if (!f.tiled) {
    f.out_channels = sizes[0];
    if (out_channels && *out_channels != sizes[0])
      fail(op, "out_channels", text(sizes[0], ", the first size of weight_words"),
           text(*out_channels));
    return f;
  }
  if (groups < 1) fail(op, "groups", "at least 1", text(groups));
  const int64_t cout = f.out_channels = out_channels.value_or(sizes[0] * kTile);
  if (cout < 1 || cout % groups || groups * ((cout / groups + kTile - 1) / kTile) != sizes[0])
    fail(op, "out_channels", text("what ", sizes[0], " tiles of ", kTile, " hold"), text(cout));
  return f;
}

}  // namespace bitkernels
