// Stand-alone test of the CPU engine: every kernel that this machine supports against loops that
// take one bit at a time. Buffers are exactly as long as the headers state, for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "packed_conv2d.h"
#include "packed_max_pool2d.h"
#include "parallel.h"
#include "rprelu.h"
#include "sign_pack.h"

namespace bitkernels {

int threads = 3;
int parallel_threads() { return threads; }

// One thread does the ranges of several, the last first: no range may rely on an earlier one.
void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t size = std::max(grain, (n + threads - 1) / threads);
  for (int64_t begin = (n - 1) / size * size; begin >= 0; begin -= size)
    body(begin, std::min(begin + size, n), context);
}

namespace {

// ------------------------------------------------------------------- results and random choices

int64_t passed = 0, failed = 0;
std::string parameters;  // of the case at hand
std::mt19937 rng;

template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  ((out << args << ' '), ...);
  return out.str();
}

bool same(uint64_t a, uint64_t b) { return a == b; }
bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// One check: got(i) is want(i) for all i < n.
template <class Got, class Want>
void check(const char* what, int64_t n, const Got& got, const Want& want) {
  for (int64_t i = 0; i < n; ++i) {
    const auto g = got(i);
    const decltype(g) w = want(i);
    if (same(g, w)) continue;
    if (++failed <= 10)
      std::printf("FAILED %s, element %lld of %lld: got %s, want %s\n  %s\n", what,
                  static_cast<long long>(i), static_cast<long long>(n), text(g).c_str(),
                  text(w).c_str(), parameters.c_str());
    return;
  }
  ++passed;
}

int64_t range(int64_t first, int64_t last) {
  return first + static_cast<int64_t>(rng() % static_cast<uint64_t>(last - first + 1));
}
bool chance(int percent) { return range(0, 99) < percent; }
template <class T>
T pick(std::initializer_list<T> list) {
  return list.begin()[range(0, static_cast<int64_t>(list.size()) - 1)];
}

// ------------------------------------------------------------------- real tensors

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF64};

DType wide_type(DType t) { return t == DType::kF64 ? DType::kF64 : DType::kF32; }
// A sum or product of two floats, taken in double and rounded here, is the one taken in float.
double wide(DType t, double x) { return t == DType::kF64 ? x : static_cast<float>(x); }

int fraction_bits(DType t) { return t == DType::kF16 ? 10 : 7; }

// To a 16-bit type, to nearest, ties to even.
uint16_t narrowed(double x, DType t) {
  const int fraction = fraction_bits(t), bias = (1 << (14 - fraction)) - 1;
  const int sign = std::signbit(x) ? 0x8000 : 0, infinity = 0x7fff >> fraction << fraction;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (fraction - 1));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
  int exponent;
  std::frexp(x, &exponent);
  exponent = x == 0 ? 1 - bias : std::max(exponent - 1, 1 - bias);
  if (exponent > bias) return static_cast<uint16_t>(sign | infinity);
  // In units of the last place, with the implicit bit, which a subnormal lacks.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), fraction - exponent)));
  const int bits = ((exponent + bias - 1) << fraction) + units;
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

double widened(uint16_t bits, DType t) {
  const int fraction = fraction_bits(t), bias = (1 << (14 - fraction)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction, low = bits & ((1 << fraction) - 1);
  double x =
      std::ldexp(low + (exponent ? 1 << fraction : 0), std::max(exponent, 1) - bias - fraction);
  if (exponent == 2 * bias + 1) x = low ? kNan : kInf;
  return bits & 0x8000 ? -x : x;
}

class Real {
 public:
  // What no one writes keeps a value that no one would write.
  Real(DType type, int64_t n) : type_(type), size_(n), bytes_(new char[n * size_of(type)]) {
    std::memset(bytes_.get(), 0x5a, n * size_of(type));
  }
  void* data() const { return bytes_.get(); }
  float* floats() const { return reinterpret_cast<float*>(bytes_.get()); }
  int64_t size() const { return size_; }
  uint64_t raw(int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, bytes_.get() + i * size_of(type_), size_of(type_));
    return bits;
  }
  void set_raw(int64_t i, uint64_t bits) {
    std::memcpy(bytes_.get() + i * size_of(type_), &bits, size_of(type_));
  }
  double get(int64_t i) const {
    const uint64_t bits = raw(i);
    if (size_of(type_) == 2) return widened(static_cast<uint16_t>(bits), type_);
    float f;
    double d;
    std::memcpy(&f, &bits, 4);
    std::memcpy(&d, &bits, 8);
    return type_ == DType::kF32 ? f : d;
  }
  void set(int64_t i, double x) {
    uint64_t bits = 0;
    const float f = static_cast<float>(x);
    if (size_of(type_) == 2) bits = narrowed(x, type_);
    if (type_ == DType::kF32) std::memcpy(&bits, &f, 4);
    if (type_ == DType::kF64) std::memcpy(&bits, &x, 8);
    set_raw(i, bits);
  }

 private:
  DType type_;
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
};

Real random_real(DType type, int64_t n, bool special) {
  Real x(type, n);
  const double one_ulp = type == DType::kF64   ? 0x1p-1074
                         : type == DType::kF32 ? 0x1p-149
                         : type == DType::kF16 ? 0x1p-24
                                               : 0x1p-133;
  const double largest = type == DType::kF64   ? 0x1.fffffffffffffp1023
                         : type == DType::kF32 ? 0x1.fffffep127
                         : type == DType::kF16 ? 65504
                                               : 0x1.fep127;
  for (int64_t i = 0; i < n; ++i) {
    double value = (static_cast<double>(rng()) / 0x1p31 - 1) * 2;
    if (special && chance(40))
      value =
          std::copysign(pick({kNan, kInf, 0.0, one_ulp, 3 * one_ulp, largest, 1.25, 0.25}), value);
    x.set(i, value);
  }
  return x;
}
void all(Real& x, double value) {
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, value);
}

// ------------------------------------------------------------------- words

struct Words {
  explicit Words(int64_t n) : size(n), data(new uint32_t[n]) {
    std::fill(data.get(), data.get() + n, 0x5a5a5a5a);
  }
  uint32_t operator[](int64_t i) const { return data[i]; }
  bool bit(int64_t row, int64_t words, int64_t c) const {
    return data[row * words + c / 32] >> c % 32 & 1;
  }
  int64_t size;
  std::unique_ptr<uint32_t[]> data;
};

int64_t word_count(int64_t channels) { return (channels + 31) / 32; }

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
  check(
      what, got.size, [&](int64_t i) { return uint64_t{got[i]}; },
      [&](int64_t i) { return word_of(i, channels, bit); });
}

// pattern: -1 and 1 all bits alike, else random.
Words random_words(int64_t rows, int64_t channels, int pattern = 0) {
  Words words(rows * word_count(channels));
  for (int64_t i = 0; i < words.size; ++i)
    words.data[i] = word_of(i, channels, [&](int64_t, int64_t) {
      return pattern ? pattern > 0 : static_cast<bool>(rng() & 1);
    });
  return words;
}

// ------------------------------------------------------------------- bits in and out, activations

struct Shape {
  DType type;
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
  int64_t at(int64_t row, int64_t c) const {
    return (row / inner * channels + c) * inner + row % inner;
  }
  int64_t channel(int64_t i) const { return i / inner % channels; }
  std::string parameters() const {
    return text("type", static_cast<int>(type), "shape", outer, channels, inner);
  }
};

void test_bits(const Kernel& k, const Shape& s, bool shifted, bool masked) {
  const double clip = pick({0.0, 1.25, kInf});
  parameters = text(k.name, s.parameters(), "shift", shifted, "mask", masked, "clip", clip);
  const int64_t rows = s.outer * s.inner, words = word_count(s.channels);
  const Real x = random_real(s.type, s.size(), true);
  const Real shift = random_real(wide_type(s.type), s.channels + 32, true);
  Words signs(rows * words), mask(rows * words);
  sign_pack(k, x.data(), s.type, s.outer, s.channels, s.inner, shifted ? shift.data() : nullptr,
            clip, signs.data.get(), masked ? mask.data.get() : nullptr);
  const auto value = [&](int64_t row, int64_t c) {
    return wide(s.type, x.get(s.at(row, c)) + (shifted ? shift.get(c) : 0));
  };
  check_words("sign_pack", signs, s.channels,
              [&](int64_t row, int64_t c) { return !(value(row, c) < 0); });
  if (masked)
    check_words("sign_pack mask", mask, s.channels,
                [&](int64_t row, int64_t c) { return std::fabs(value(row, c)) <= clip; });

  const Words bits = random_words(rows, s.channels);
  Real out(s.type, s.size());
  mask_grad(k, x.data(), s.type, s.outer, s.channels, s.inner, bits.data.get(), out.data());
  check(
      "mask_grad", s.size(), [&](int64_t i) { return out.raw(i); },
      [&](int64_t i) {
        const int64_t row = i / s.inner / s.channels * s.inner + i % s.inner;
        return bits.bit(row, words, s.channel(i)) ? x.raw(i) : 0;
      });

  Real unpacked(s.type, s.size());
  unpack(k, bits.data.get(), s.type, rows, s.channels, unpacked.data());
  check(
      "unpack", s.size(), [&](int64_t i) { return unpacked.get(i); },
      [&](int64_t i) { return bits.bit(i / s.channels, words, i % s.channels) ? 1.0 : -1.0; });
}

void test_activations(const Kernel& k, const Shape& s, bool special) {
  parameters = text(k.name, s.parameters(), "special values", special);
  const DType w = wide_type(s.type);
  const int64_t n = s.size(), padded = s.channels + 16;
  const Real x = random_real(s.type, n, special), grad = random_real(s.type, n, special);
  const Real shift_in = random_real(w, padded, special), slope = random_real(w, padded, special),
             shift_out = random_real(w, padded, special);
  Real out(s.type, n), want(s.type, n);
  const auto check_real = [&](const char* what) {
    check(what, n, [&](int64_t i) { return out.get(i); }, [&](int64_t i) { return want.get(i); });
  };
  const auto shifted = [&](int64_t i) { return wide(w, x.get(i) + shift_in.get(s.channel(i))); };

  rsign(k, x.data(), s.type, s.outer, s.channels, s.inner, shift_in.data(), out.data());
  for (int64_t i = 0; i < n; ++i) want.set(i, shifted(i) < 0 ? -1 : 1);
  check_real("rsign");

  rprelu(k, x.data(), s.type, s.outer, s.channels, s.inner, shift_in.data(), slope.data(),
         shift_out.data(), out.data());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = s.channel(i);
    const double y = shifted(i), bent = y > 0 ? y : wide(w, y * slope.get(c));
    want.set(i, wide(w, bent + shift_out.get(c)));
  }
  check_real("rprelu");

  Real sums(DType::kF32, 3 * s.channels), sums_of_one(DType::kF32, 3 * s.channels);
  threads = 1;
  rprelu_backward(k, grad.data(), x.data(), s.type, s.outer, s.channels, s.inner, shift_in.data(),
                  slope.data(), out.data(), sums_of_one.floats());
  threads = 3;
  rprelu_backward(k, grad.data(), x.data(), s.type, s.outer, s.channels, s.inner, shift_in.data(),
                  slope.data(), out.data(), sums.floats());
  std::vector<double> total(3 * s.channels), size(3 * s.channels);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = s.channel(i);
    const double y = shifted(i), g = grad.get(i), down = y > 0 ? g : wide(w, g * slope.get(c));
    want.set(i, down);
    const double terms[] = {down, y > 0 ? 0 : g * y, g};
    for (int part = 0; part < 3; ++part) {
      total[part * s.channels + c] += terms[part];
      size[part * s.channels + c] += std::fabs(terms[part]);
    }
  }
  check_real("rprelu_backward");
  check(
      "rprelu_backward sums on one thread and more", 3 * s.channels,
      [&](int64_t i) { return sums.get(i); }, [&](int64_t i) { return sums_of_one.get(i); });
  if (special) return;
  const double tolerance = s.type == DType::kF64 ? 0x1p-23 : 1e-4;
  check(
      "rprelu_backward sums", 3 * s.channels,
      [&](int64_t i) { return std::fabs(sums.get(i) - total[i]) <= tolerance * size[i] ? 1.0 : 0; },
      [](int64_t) { return 1.0; });
}

// ------------------------------------------------------------------- convolution

int64_t out_size(int64_t size, int64_t pads, int64_t taps, int64_t stride, int64_t dilation) {
  const int64_t last = size + pads - dilation * (taps - 1) - 1;
  return last < 0 ? 0 : last / stride + 1;
}

int64_t products(const Conv& c) {
  return c.batch * c.out_h * c.out_w * c.groups * c.out_channels * c.kh * c.kw * c.channels;
}

Conv random_conv() {
  Conv c;
  do {
    const bool pointwise = chance(20);
    const auto padding = [&] { return pointwise ? 0 : pick<int64_t>({0, 0, 0, 1, 2, 5, 11}); };
    const auto upto = [&](int64_t most) { return pointwise ? 1 : range(1, most); };
    c.batch = range(0, 2);
    c.height = range(1, 9);
    c.width = range(1, 9);
    c.groups = range(1, 3);
    c.channels = pick<int64_t>({1, 7, 31, 32, 33, 64, 100, 1100});
    c.out_channels = pick<int64_t>({1, 7, 16, 17, 32, 33, 48});
    c.kh = upto(5);
    c.kw = upto(5);
    c.stride_h = upto(3);
    c.stride_w = upto(3);
    c.top = padding();
    c.bottom = padding();
    c.left = padding();
    c.right = padding();
    c.dilation_h = upto(3);
    c.dilation_w = upto(3);
    c.pad_value = static_cast<int>(range(-1, 1));
    c.out_h = out_size(c.height, c.top + c.bottom, c.kh, c.stride_h, c.dilation_h);
    c.out_w = out_size(c.width, c.left + c.right, c.kw, c.stride_w, c.dilation_w);
  } while (c.out_h == 0 || c.out_w == 0 || products(c) > 400000);
  return c;
}

enum Layout { kChannelsLast, kPlanar, kGaps, kBroadcast };

Strides strides_of(Layout layout, int64_t channels, int64_t h, int64_t w) {
  const int64_t pixel = channels + (layout == kGaps ? 3 : 0);
  const int64_t row = pixel * w + (layout == kGaps ? 5 : 0);
  if (layout == kBroadcast) return {0, 1, 0, 0};
  if (layout == kPlanar) return {channels * h * w, h * w, w, 1};
  return {row * h, 1, row, pixel};
}

// Dot products (batch, out_h, out_w, out channels of all groups), padding as its value.
std::vector<int32_t> naive_conv(const Conv& c, const Words& in, const Words& weight) {
  const int64_t cout = c.groups * c.out_channels;
  const int64_t in_words = word_count(c.groups * c.channels), w_words = word_count(c.channels);
  std::vector<int32_t> dots;
  for (int64_t n = 0; n < c.batch; ++n)
    for (int64_t y = 0; y < c.out_h; ++y)
      for (int64_t x = 0; x < c.out_w; ++x)
        for (int64_t o = 0; o < cout; ++o) {
          int32_t dot = 0;
          for (int64_t tap = 0; tap < c.kh * c.kw; ++tap) {
            const int64_t iy = y * c.stride_h - c.top + tap / c.kw * c.dilation_h;
            const int64_t ix = x * c.stride_w - c.left + tap % c.kw * c.dilation_w;
            const bool inside = iy >= 0 && iy < c.height && ix >= 0 && ix < c.width;
            const int64_t pixel = (n * c.height + iy) * c.width + ix;
            const int64_t first = o / c.out_channels * c.channels;
            for (int64_t i = 0; i < c.channels; ++i) {
              const int w = weight.bit(o * c.kh * c.kw + tap, w_words, i) ? 1 : -1;
              const int a = !inside ? c.pad_value : in.bit(pixel, in_words, first + i) ? 1 : -1;
              dot += a * w;
            }
          }
          dots.push_back(dot);
        }
  return dots;
}

Words tiled(const Conv& c, const Words& weight) {
  const int64_t taps = c.kh * c.kw * word_count(c.channels), per_group = (c.out_channels + 15) / 16;
  Words tiles(c.groups * per_group * taps * 16);
  tile_weight(weight.data.get(), c.groups, c.out_channels, taps, tiles.data.get());
  check(
      "tile_weight", tiles.size, [&](int64_t i) { return uint64_t{tiles[i]}; },
      [&](int64_t i) {
        const int64_t tile = i / 16 / taps, o = tile % per_group * 16 + i % 16;
        const int64_t row = tile / per_group * c.out_channels + o;
        return o < c.out_channels ? weight[row * taps + i / 16 % taps] : 0;
      });
  return tiles;
}

void test_conv(const Kernel& k, Conv c) {
  enum {
    kClamp = 1,
    kScale = 2,
    kBias = 4,
    kResidual = 8,
    kSlope = 16,
    kIn = 32,
    kOut = 64,
    kSign = 128
  };
  const int64_t cout = c.groups * c.out_channels, pixels = c.batch * c.out_h * c.out_w;
  const int alike = chance(10) ? 1 : 0;            // every product -1: the largest popcounts
  const int kind = static_cast<int>(range(0, 5));  // thresholds, int, or a type of kTypes
  const DType type = kind < 2 ? DType::kF32 : kTypes[kind - 2], res_type = kTypes[range(0, 3)];
  int parts = pick({0, 1 << range(0, 7), 255, static_cast<int>(rng() & 255)});
  if (parts & (kIn | kOut)) parts |= kSlope;
  if (kind < 2) parts = 0;
  const int outputs = kind == 0 ? 2 : static_cast<int>(range(1, 3));  // real 1, words 2
  const Layout layout = pick({kChannelsLast, kPlanar, kGaps});
  const Layout res_layout = pick({kChannelsLast, kPlanar, kGaps, kBroadcast});
  threads = pick({1, 3});
  parameters = text(
      k.name, "batch", c.batch, "image", c.height, c.width, "groups", c.groups, "channels",
      c.channels, c.out_channels, "kernel", c.kh, c.kw, "stride", c.stride_h, c.stride_w, "padding",
      c.top, c.bottom, c.left, c.right, "of", c.pad_value, "dilation", c.dilation_h, c.dilation_w,
      "out", c.out_h, c.out_w, "kind", kind, "parts", parts, "outputs", outputs, "layout", layout,
      res_layout, "residual type", static_cast<int>(res_type), "alike", alike, "threads", threads);

  const Words in = random_words(c.batch * c.height * c.width, c.groups * c.channels, alike);
  const Words weight = random_words(cout * c.kh * c.kw, c.channels, -alike);
  const Words tiles = tiled(c, weight);
  c.input = in.data.get();
  c.tiles = tiles.data.get();

  const auto vector = [&] { return random_real(DType::kF32, cout + 32, false); };
  const Real scale = vector(), bias = vector(), shift_in = vector(), slope = vector(),
             shift_out = vector(), sign_shift = vector();
  std::unique_ptr<int32_t[]> lo(new int32_t[cout + 32]), hi(new int32_t[cout + 32]);
  for (int64_t i = 0; i < cout + 32; ++i) {
    lo[i] = pick<int32_t>({INT32_MIN, -20, -3, 0, 2, INT32_MAX});
    hi[i] = pick<int32_t>({INT32_MIN, -7, 0, 1, 25, INT32_MAX});
  }
  const Strides out = strides_of(layout, cout, c.out_h, c.out_w);
  const Strides res = strides_of(res_layout, cout, c.out_h, c.out_w);
  const auto extent = [&](const Strides& s) {
    return pixels ? 1 + (c.batch - 1) * s.n + (cout - 1) * s.c + (c.out_h - 1) * s.h +
                        (c.out_w - 1) * s.w
                  : 0;
  };
  const auto at = [&](const Strides& s, int64_t pixel, int64_t o) {
    return pixel / c.out_w / c.out_h * s.n + o * s.c + pixel / c.out_w % c.out_h * s.h +
           pixel % c.out_w * s.w;
  };
  const Real residual = random_real(res_type, extent(res), true);
  Real got(type, extent(out)), want(type, extent(out));
  Words words(pixels * word_count(cout));

  Epilogue e;
  const auto floats = [&](int part, const Real& x) { return parts & part ? x.floats() : nullptr; };
  e.clamp = parts & kClamp;
  e.lo = pick({-static_cast<float>(kInf), -2.5f, 1.0f});
  e.hi = pick({static_cast<float>(kInf), 3.5f, 1.0f});
  e.scale = floats(kScale, scale);
  e.bias = floats(kBias, bias);
  e.residual = parts & kResidual ? residual.data() : nullptr;
  e.residual_type = res_type;
  e.residual_channel = res.c;
  e.slope = floats(kSlope, slope);
  e.shift_in = floats(kIn, shift_in);
  e.shift_out = floats(kOut, shift_out);
  e.sign_shift = floats(kSign, sign_shift);
  e.t_lo = kind == 0 ? lo.get() : nullptr;
  e.t_hi = kind == 0 ? hi.get() : nullptr;
  e.out = outputs & 1 ? got.data() : nullptr;
  e.out_int = kind == 1 && e.out;
  e.out_type = type;
  e.out_channel = out.c;
  e.words = outputs & 2 ? words.data.get() : nullptr;
  packed_conv2d(k, c, e, out, res);
  threads = 3;

  const std::vector<int32_t> dots = naive_conv(c, in, weight);
  std::vector<bool> bits(pixels * cout);
  for (int64_t i = 0; i < pixels * cout; ++i) {
    const int64_t pixel = i / cout, o = i % cout;
    float y = static_cast<float>(dots[i]);
    if (e.clamp) y = std::min(std::max(y, e.lo), e.hi);
    if (e.scale) y *= e.scale[o];
    if (e.bias) y += e.bias[o];
    if (e.residual) y += static_cast<float>(residual.get(at(res, pixel, o)));
    if (e.shift_in) y += e.shift_in[o];
    if (e.slope && !(y > 0)) y *= e.slope[o];
    if (e.shift_out) y += e.shift_out[o];
    if (e.out_int)
      want.set_raw(at(out, pixel, o), static_cast<uint32_t>(dots[i]));
    else if (e.out)
      want.set(at(out, pixel, o), y);
    if (e.sign_shift) y += e.sign_shift[o];
    bits[i] = e.t_lo ? dots[i] >= lo[o] && dots[i] <= hi[o] : !(y < 0);
  }
  if (e.out_int)
    check(
        "packed_conv2d integers", got.size(), [&](int64_t i) { return got.raw(i); },
        [&](int64_t i) { return want.raw(i); });
  else if (e.out)
    check(
        "packed_conv2d", got.size(), [&](int64_t i) { return got.get(i); },
        [&](int64_t i) { return want.get(i); });
  if (e.words)
    check_words("packed_conv2d words", words, cout,
                [&](int64_t pixel, int64_t o) { return bits[pixel * cout + o]; });
}

// Enough work for several tasks: whole groups, groups that share words, one long row, and a copy.
const Conv kLarge[] = {
    {2, 9, 9, 1, 100, 96, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9, 0, nullptr, nullptr},
    {2, 9, 9, 3, 100, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9, -1, nullptr, nullptr},
    {2, 15, 15, 1, 256, 96, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 15, 15, 0, nullptr, nullptr},
    {3, 9, 9, 3, 7, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9, 1, nullptr, nullptr}};

// ------------------------------------------------------------------- pooling

void test_pool(int64_t batch, int64_t height, int64_t width) {
  Pool p;
  p.batch = batch;
  p.height = height;
  p.width = width;
  p.words = range(1, 4);
  p.kh = range(1, 4);
  p.kw = range(1, 4);
  p.stride_h = range(1, 3);
  p.stride_w = range(1, 3);
  p.pad_h = range(0, 3);
  p.pad_w = range(0, 3);
  p.dilation_h = range(1, 3);
  p.dilation_w = range(1, 3);
  p.out_h = out_size(height, 2 * p.pad_h, p.kh, p.stride_h, p.dilation_h);
  p.out_w = out_size(width, 2 * p.pad_w, p.kw, p.stride_w, p.dilation_w);
  parameters =
      text("pool", batch, height, width, p.words, "kernel", p.kh, p.kw, "stride", p.stride_h,
           p.stride_w, "padding", p.pad_h, p.pad_w, "dilation", p.dilation_h, p.dilation_w);
  const Words in = random_words(batch * height * width, 32 * p.words);
  Words out(batch * p.out_h * p.out_w * p.words);
  packed_max_pool2d(p, in.data.get(), out.data.get());
  check_words("packed_max_pool2d", out, 32 * p.words, [&](int64_t row, int64_t c) {
    for (int64_t ky = 0; ky < p.kh; ++ky)
      for (int64_t kx = 0; kx < p.kw; ++kx) {
        const int64_t y = row / p.out_w % p.out_h * p.stride_h - p.pad_h + ky * p.dilation_h;
        const int64_t x = row % p.out_w * p.stride_w - p.pad_w + kx * p.dilation_w;
        const int64_t n = row / p.out_w / p.out_h;
        if (y >= 0 && y < height && x >= 0 && x < width &&
            in.bit((n * height + y) * width + x, p.words, c))
          return true;
      }
    return false;
  });
}

// ------------------------------------------------------------------- all of it

void test_kernel(const Kernel& k) {
  rng.seed(20240229);
  for (const DType type : kTypes) {
    for (const int64_t channels : {1, 7, 31, 32, 33, 64, 100})
      for (const int64_t inner : {1, 2, 15, 16, 17, 70})
        for (const int64_t outer : {0, 1, 3}) {
          const Shape shape = {type, outer, channels, inner};
          for (int options = 0; options < 4; ++options)
            test_bits(k, shape, options & 1, options & 2);
          test_activations(k, shape, true);
          test_activations(k, shape, false);
        }
    for (const Shape& shape : {Shape{type, 1300, 40, 1}, Shape{type, 1, 40, 2100}}) {
      test_bits(k, shape, true, true);
      test_bits(k, shape, false, false);
      test_activations(k, shape, false);
    }
  }
  for (int i = 0; i < 1500; ++i) test_conv(k, random_conv());
  for (const Conv& conv : kLarge)
    for (int i = 0; i < 2; ++i) test_conv(k, conv);
  for (int i = 0; i < 200; ++i) test_pool(range(0, 2), range(1, 9), range(1, 9));
  test_pool(2, 70, 70);

  parameters = k.name;
  uint32_t sink = 1;
  const int64_t once = k.popcount_loop(1, &sink), more = k.popcount_loop(1000, &sink);
  check(
      "popcount_loop", 1, [&](int64_t) { return uint64_t(more); },
      [&](int64_t) { return 1000 * once; });
}

int test_all() {
  for (int i = 0; i < kKernelCount; ++i) {
    const Kernel& k = *kKernels[i];
    const int64_t before = passed + failed;
    if (k.supported()) test_kernel(k);
    std::printf("%-7s %lld checks%s\n", k.name, static_cast<long long>(passed + failed - before),
                k.supported() ? "" : ", not supported by this machine");
    std::fflush(stdout);
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed),
              static_cast<long long>(failed));
  return failed != 0;
}

}  // namespace
}  // namespace bitkernels

int main() { return bitkernels::test_all(); }
