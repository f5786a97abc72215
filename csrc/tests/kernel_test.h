// What the parts of the CPU engine's stand-alone test share: checks, random operands, one-bit
// loops.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/packed_conv2d.h"

namespace bitkernels {

inline int threads = 3;
inline int64_t passed = 0, failed = 0;
inline std::string parameters;  // of the case at hand
inline std::mt19937 rng;

template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  ((out << args << ' '), ...);
  return out.str();
}

// Of the random cases one in so many runs. With threads one in ten: nearly all of them have one
// task, in which no threads meet, and cost ten times as much.
#ifdef REAL_THREADS
inline int one_in = 10;
#else
inline int one_in = 1;
#endif
inline int cases(int count) { return (count + one_in - 1) / one_in; }

// NaNs are alike, zeros of different signs are not.
template <class T>
bool same(T a, T b) {
  return a == b ? std::signbit(static_cast<double>(a)) == std::signbit(static_cast<double>(b))
                : a != a && b != b;
}

// One check: of the pair f(i), what came out and what should have, for all i < n.
template <class F>
void check(const char* what, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; ++i) {
    const auto [got, want] = f(i);
    if (same(got, want)) continue;
    if (++failed <= 10)
      std::cout << "FAILED " << what << ", element " << i << " of " << n << ": got " << got
                << ", want " << want << "\n  " << parameters << "\n";
    return;
  }
  ++passed;
}

inline int64_t range(int64_t first, int64_t last) {
  return first + static_cast<int64_t>(rng() % static_cast<uint64_t>(last - first + 1));
}
template <class T>
T pick(std::initializer_list<T> list) {
  return list.begin()[range(0, static_cast<int64_t>(list.size()) - 1)];
}

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF64};
constexpr double kSmallest[] = {0x1p-149, 0x1p-24, 0x1p-133, 0x1p-1074};  // by DType
constexpr double kLargest[] = {0x1.fffffep127, 65504, 0x1.fep127, 0x1.fffffffffffffp1023};

inline DType wide_type(DType t) { return t == DType::kF64 ? DType::kF64 : DType::kF32; }
// A sum or product of two floats, taken in double and rounded here, is the one taken in float.
inline double wide(DType t, double x) { return t == DType::kF64 ? x : static_cast<float>(x); }

inline int fraction_bits(DType t) { return t == DType::kF16 ? 10 : 7; }

// To a 16-bit type, to nearest, ties to even.
inline uint16_t narrowed(double x, DType t) {
  const int fraction = fraction_bits(t), bias = (1 << (14 - fraction)) - 1;
  const int sign = std::signbit(x) ? 0x8000 : 0, infinity = 0x7fff >> fraction << fraction;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (fraction - 1));
  int exponent = 0;
  if (!std::isinf(x)) std::frexp(x, &exponent);
  exponent = x == 0 ? 1 - bias : std::max(exponent - 1, 1 - bias);
  if (std::isinf(x) || exponent > bias) return static_cast<uint16_t>(sign | infinity);
  // In units of the last place, with the implicit bit, which a subnormal lacks.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), fraction - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + bias - 1) << fraction) + units));
}

inline double widened(uint16_t bits, DType t) {
  const int fraction = fraction_bits(t), bias = (1 << (14 - fraction)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction, low = bits & ((1 << fraction) - 1);
  const int units = low + (exponent ? 1 << fraction : 0);
  double x = std::ldexp(units, std::max(exponent, 1) - bias - fraction);
  if (exponent == 2 * bias + 1) x = low ? kNan : kInf;
  return bits & 0x8000 ? -x : x;
}

struct Real {
  DType type;
  int64_t size;
  std::unique_ptr<char[]> bytes;

  // What no one writes keeps a value that no one would write.
  Real(DType t, int64_t n) : type(t), size(n), bytes(new char[n * size_of(t)]) {
    std::memset(bytes.get(), 0x5a, n * size_of(t));
  }
  void* data() const { return bytes.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(bytes.get());
  }
  double get(int64_t i) const {
    if (type == DType::kF32) return as<float>()[i];
    return type == DType::kF64 ? as<double>()[i] : widened(as<uint16_t>()[i], type);
  }
  void set(int64_t i, double x) {
    if (type == DType::kF32) as<float>()[i] = static_cast<float>(x);
    if (type == DType::kF64) as<double>()[i] = x;
    if (size_of(type) == 2) as<uint16_t>()[i] = narrowed(x, type);
  }
  uint64_t bits(int64_t i) const {
    if (size_of(type) == 2) return as<uint16_t>()[i];
    return size_of(type) == 4 ? as<uint32_t>()[i] : as<uint64_t>()[i];
  }
};

inline Real random_real(DType type, int64_t n, bool special) {
  Real x(type, n);
  const double tiny = kSmallest[static_cast<int>(type)], huge = kLargest[static_cast<int>(type)];
  for (int64_t i = 0; i < n; ++i) {
    x.set(i, (static_cast<double>(rng()) / 0x1p31 - 1) * 2);
    const double value = pick({kNan, kInf, 0.0, tiny, 3 * tiny, huge, 1.25, 0.25});
    if (special && range(0, 4) < 2) x.set(i, std::copysign(value, x.get(i)));
  }
  return x;
}

inline void check_real(const char* what, const Real& got, const Real& want) {
  check(what, got.size, [&](int64_t i) { return std::pair(got.get(i), want.get(i)); });
}

struct Words {
  int64_t size;
  std::unique_ptr<uint32_t[]> data;

  explicit Words(int64_t n) : size(n), data(new uint32_t[n]) {
    std::fill(data.get(), data.get() + n, 0x5a5a5a5a);
  }
  bool bit(int64_t row, int64_t words, int64_t c) const {
    return data[row * words + c / 32] >> c % 32 & 1;
  }
};

inline int64_t word_count(int64_t channels) { return (channels + 31) / 32; }

// Word i of rows of `channels` bits, bit(row, channel).
template <class Bit>
uint32_t word_of(int64_t i, int64_t channels, const Bit& bit) {
  uint32_t word = 0;
  const int64_t row = i / word_count(channels), first = i % word_count(channels) * 32;
  for (int64_t c = first; c < std::min(first + 32, channels); ++c)
    word |= static_cast<uint32_t>(bit(row, c)) << (c - first);
  return word;
}

template <class Bit>
void check_words(const char* what, const Words& got, int64_t channels, const Bit& bit) {
  check(what, got.size,
        [&](int64_t i) { return std::pair(got.data[i], word_of(i, channels, bit)); });
}

// all: 1 or -1 for every bit, 0 for random ones.
inline Words random_words(int64_t rows, int64_t channels, int all = 0) {
  Words words(rows * word_count(channels));
  const auto bit = [&](int64_t, int64_t) { return all ? all > 0 : (rng() & 1) == 1; };
  for (int64_t i = 0; i < words.size; ++i) words.data[i] = word_of(i, channels, bit);
  return words;
}

inline int64_t out_size(int64_t size, int64_t pads, int64_t taps, int64_t stride,
                        int64_t dilation) {
  const int64_t last = size + pads - dilation * (taps - 1) - 1;
  return last < 0 ? 0 : last / stride + 1;
}

inline Conv random_conv() {
  const bool pointwise = range(0, 4) == 0;
  const auto upto = [&](int64_t most) { return pointwise ? 1 : range(1, most); };
  const auto pad = [&] { return pointwise ? 0 : pick<int64_t>({0, 0, 0, 1, 2, 5, 11}); };
  const int64_t channels = pick<int64_t>({1, 7, 31, 32, 33, 64, 100, 1100});
  const int64_t out_channels = pick<int64_t>({1, 7, 16, 17, 32, 33, 48, 70});
  const int pad_value = static_cast<int>(range(-1, 1));
  Conv c = {range(0, 2), range(1, 9), range(1, 9), range(1, 3), channels,  out_channels, upto(5),
            upto(5),     upto(3),     upto(3),     pad(),       pad(),     pad(),        pad(),
            upto(3),     upto(3),     0,           0,           pad_value, nullptr,      nullptr};
  c.out_h = out_size(c.height, c.top + c.bottom, c.kh, c.stride_h, c.dilation_h);
  c.out_w = out_size(c.width, c.left + c.right, c.kw, c.stride_w, c.dilation_w);
  const int64_t taps = c.out_h * c.out_w * c.kh * c.kw;
  const bool fits = taps > 0 && c.batch * taps * channels * c.groups * out_channels <= 400000;
  return fits ? c : random_conv();
}

// One tap and an even number of products, in words that kernels may keep in registers, and in more.
inline Conv pointwise_conv() {
  Conv c = {
      range(1, 2), range(1, 5), range(1, 20), range(1, 2), 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0,
      0,           0,           {},           {}};
  c.channels = pick<int64_t>({2, 32, 62, 64, 96, 128, 200, 256, 288});
  c.out_channels = pick<int64_t>({32, 33, 64, 70});
  c.stride_h = c.stride_w = range(1, 2);
  c.out_h = out_size(c.height, 0, 1, c.stride_h, 1);
  c.out_w = out_size(c.width, 0, 1, c.stride_w, 1);
  return c;
}

// A window for each channel, of as many taps as bit planes count and more.
inline Conv depthwise_conv() {
  Conv c = random_conv();
  c.channels = c.out_channels = 1;
  c.groups = pick<int64_t>({2, 31, 32, 33, 64, 70});
  if (range(0, 9) == 0) {
    c.height = c.width = 17;
    c.kh = pick<int64_t>({15, 16, 17});
    c.kw = c.kh;
    c.top = c.bottom = c.left = c.right = 2;
    c.dilation_h = c.dilation_w = 1;
  }
  c.out_h = out_size(c.height, c.top + c.bottom, c.kh, c.stride_h, c.dilation_h);
  c.out_w = out_size(c.width, c.left + c.right, c.kw, c.stride_w, c.dilation_w);
  return c;
}

// Enough work for several tasks: whole groups, groups that share words, one long row, and a copy.
inline const Conv kLarge[] = {
    {2, 9, 9, 1, 100, 96, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9, 0, nullptr, nullptr},
    {2, 9, 9, 3, 100, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9, -1, nullptr, nullptr},
    {2, 15, 15, 1, 256, 96, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 15, 15, 0, nullptr, nullptr},
    {3, 9, 9, 3, 7, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9, 1, nullptr, nullptr}};

// The dot product of one output pixel and channel, padding as its value.
inline int32_t naive_dot(const Conv& c, const Words& in, const Words& weight, int64_t out,
                         int64_t o) {
  int32_t dot = 0;
  for (int64_t tap = 0; tap < c.kh * c.kw; ++tap) {
    const int64_t y = out / c.out_w % c.out_h * c.stride_h - c.top + tap / c.kw * c.dilation_h;
    const int64_t x = out % c.out_w * c.stride_w - c.left + tap % c.kw * c.dilation_w;
    const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
    const int64_t pixel = (out / c.out_w / c.out_h * c.height + y) * c.width + x;
    for (int64_t i = 0; i < c.channels; ++i) {
      const int64_t channel = o / c.out_channels * c.channels + i;
      const bool positive = inside && in.bit(pixel, word_count(c.groups * c.channels), channel);
      const int a = !inside ? c.pad_value : positive ? 1 : -1;
      dot += weight.bit(o * c.kh * c.kw + tap, word_count(c.channels), i) ? a : -a;
    }
  }
  return dot;
}

void test_block_passes(const Kernel& k);  // kernel_test_block.cpp
void test_gradients(const Kernel& k);     // kernel_test_grads.cpp
void test_real_layers(const Kernel& k);   // kernel_test_real.cpp
void test_int8_layers(const Kernel& k);   // kernel_test_int8.cpp

}  // namespace bitkernels
