// What the tests of real and int8 layers share: rows in memory, windows, random convolutions.
#pragma once
#include "cpu/conv2d.h"
#include "kernel_test.h"

namespace bitkernels {

// Rows of channels, `row` elements apart; nothing may be read past the last channel of the last
// row, nor written between the rows.
struct Rows {
  int64_t rows, channels, row;
  Real data;
  Rows(int64_t n, int64_t c) : Rows(n, c, c + pick<int64_t>({0, 0, 1, 16})) {}
  Rows(int64_t n, int64_t c, int64_t between)
      : rows(n), channels(c), row(between), data(DType::kF32, n && c ? (n - 1) * row + c : 0) {}
  float* at() const { return data.as<float>(); }
  double get(int64_t r, int64_t c) const { return data.get(r * row + c); }
};

inline Rows random_rows(int64_t rows, int64_t channels, bool special) {
  Rows x(rows, channels);
  x.data = random_real(DType::kF32, x.data.size, special);
  return x;
}
// Sums of these neither overflow nor lose digits of small numbers.
inline Rows random_terms(int64_t rows, int64_t channels, bool special) {
  Rows x = random_rows(rows, channels, false);
  for (int64_t i = 0; special && i < x.data.size; ++i)
    if (range(0, 15) == 0) x.data.set(i, pick({kNan, kInf, -kInf}));
  return x;
}

// want(row, channel) gives a number and how far from it the result may be.
template <class F>
void check_rows(const char* what, const Rows& got, const F& want) {
  check(what, got.data.size, [&](int64_t i) {
    const int64_t r = i / got.row, c = i % got.row;
    if (c >= got.channels) {
      const uint64_t bits = got.data.bits(i);
      return std::pair(static_cast<double>(bits), static_cast<double>(0x5a5a5a5a));
    }
    const auto [number, most] = want(r, c);
    const double a = got.get(r, c);
    return std::pair(a, std::fabs(a - number) <= most ? a : number);
  });
}

inline void check_same(const char* what, const Rows& a, const Rows& b) {
  check(what, a.data.size, [&](int64_t i) { return std::pair(a.data.get(i), b.data.get(i)); });
}

struct Window {  // of one output pixel
  int64_t batch, height, width, out_h, out_w, stride_h, stride_w, top, left, dilation_h, dilation_w;
  // Row of the input under a tap, -1 outside the image.
  int64_t row(int64_t out, int64_t ky, int64_t kx) const {
    const int64_t y = out / out_w % out_h * stride_h - top + ky * dilation_h;
    const int64_t x = out % out_w * stride_w - left + kx * dilation_w;
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    return inside ? (out / out_w / out_h * height + y) * width + x : -1;
  }
};

inline RealConv random_conv2d() {
  RealConv c = {};
  const bool pointwise = range(0, 4) == 0, depthwise = range(0, 3) == 0;
  const auto upto = [&](int64_t most) { return pointwise ? 1 : range(1, most); };
  const auto pad = [&] { return pointwise ? 0 : pick<int64_t>({0, 0, 1, 1, 2, 5}); };
  const auto size = [] { return pick<int64_t>({0, 1, 3, 7, 12, 20, 37, 5, 14, 31}); };
  const auto channels = [] { return pick<int64_t>({1, 3, 5, 16, 17, 32, 33, 70}); };
  c.batch = range(0, 9) ? range(1, 3) : 0;
  c.height = size();
  c.width = size();
  c.groups = depthwise ? channels() : pick<int64_t>({1, 1, 1, 2, 3});
  c.channels = depthwise ? 1 : channels();
  c.out_channels = depthwise ? pick<int64_t>({1, 1, 1, 2}) : channels();
  if (!depthwise && range(0, 9) == 0) c.out_channels = 150;
  c.kh = upto(5);
  c.kw = upto(5);
  c.stride_h = upto(3);
  c.stride_w = upto(3);
  c.top = pad();
  c.left = pad();
  c.dilation_h = upto(3);
  c.dilation_w = upto(3);
  c.out_h = out_size(c.height, c.top + pad(), c.kh, c.stride_h, c.dilation_h);
  c.out_w = out_size(c.width, c.left + pad(), c.kw, c.stride_w, c.dilation_w);
  const int64_t taps = c.out_h * c.out_w * c.kh * c.kw;
  return c.batch * taps * c.channels * c.groups * c.out_channels > 1000000 ? random_conv2d() : c;
}

// Enough work for several tasks.
inline RealConv large_conv2d(int64_t batch, int64_t size, int64_t groups, int64_t channels,
                             int64_t out_channels, int64_t taps, int64_t stride) {
  RealConv c = {};
  c.batch = batch;
  c.height = c.width = size;
  c.groups = groups;
  c.channels = channels;
  c.out_channels = out_channels;
  c.kh = c.kw = taps;
  c.stride_h = c.stride_w = stride;
  c.top = c.left = taps / 2;
  c.dilation_h = c.dilation_w = 1;
  c.out_h = c.out_w = out_size(size, taps / 2 * 2, taps, stride, 1);
  return c;
}

}  // namespace bitkernels
