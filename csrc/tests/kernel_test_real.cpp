// Real layers against loops in double precision over single elements.
#include "kernel_test_real.h"

#include "cpu/elementwise.h"
#include "cpu/pool2d.h"

namespace bitkernels {
namespace {

double clamp(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }
int64_t ceil_out(int64_t size, int64_t taps, int64_t stride) {
  return std::max<int64_t>(0, ceil_div(size - taps, stride) + 1);
}

void test_conv2d(const Kernel& k, RealConv c, bool special) {
  const int64_t cin = c.groups * c.channels, cout = c.groups * c.out_channels;
  const int64_t taps = c.kh * c.kw;
  const bool bounds = rng() & 1, with_bias = rng() & 1;
  parameters =
      text(k.name, "image", c.batch, c.height, c.width, "groups", c.groups, "channels", c.channels,
           c.out_channels, "filter", c.kh, c.kw, "stride", c.stride_h, c.stride_w, "padding", c.top,
           c.left, "dilation", c.dilation_h, c.dilation_w, "out", c.out_h, c.out_w, special);
  const Rows in = random_terms(c.batch * c.height * c.width, cin, special);
  const Real weight = random_real(DType::kF32, cout * c.channels * taps, false);
  const Real bias = random_real(DType::kF32, cout, false);
  const Real arranged(DType::kF32, arranged_conv2d_size(k, c));
  arrange_conv2d(k, c, weight.as<float>(), arranged.as<float>());
  c.input = in.at();
  c.in_pixel = in.row;
  c.weight = arranged.as<float>();
  if (with_bias) c.bias = bias.as<float>();
  if (bounds) c.lo = -0.5f, c.hi = 1.5f;
  Rows out(c.batch * c.out_h * c.out_w, cout), again(out.rows, cout, out.row);
  c.out = out.at();
  c.out_pixel = out.row;
  conv2d(k, c);

  const Window window = {c.batch,    c.height, c.width, c.out_h,      c.out_w,     c.stride_h,
                         c.stride_w, c.top,    c.left,  c.dilation_h, c.dilation_w};
  check_rows("conv2d", out, [&](int64_t pixel, int64_t o) {
    double sum = with_bias ? bias.get(o) : 0, size = std::fabs(sum);
    for (int64_t ky = 0; ky < c.kh; ++ky)
      for (int64_t kx = 0; kx < c.kw; ++kx) {
        const int64_t row = window.row(pixel, ky, kx);
        for (int64_t i = 0; row >= 0 && i < c.channels; ++i) {
          const double term = in.get(row, o / c.out_channels * c.channels + i) *
                              weight.get(((o * c.channels + i) * c.kh + ky) * c.kw + kx);
          sum += term;
          size += std::fabs(term);
        }
      }
    // Each of as many roundings is off by at most 2^-24 of the sum of the terms' magnitudes.
    const double rounding = static_cast<double>(2 * taps * c.channels + 2) * 0x1p-24;
    return std::pair(clamp(sum, c.lo, c.hi), rounding * size);
  });
  threads = 1;
  c.out = again.at();
  conv2d(k, c);
  threads = 3;
  check_same("conv2d of one thread and of three", out, again);
}

RealPool random_pool(bool large) {
  RealPool p = {};
  const auto size = [&] { return large ? range(60, 70) : range(1, 19); };
  p.batch = range(0, 5) ? range(1, 3) : 0;
  p.height = size();
  p.width = size();
  p.channels = pick<int64_t>({1, 3, 5, 16, 17, 33, 70, 128});
  p.kh = range(1, 4);
  p.kw = range(1, 4);
  p.stride_h = range(1, 3);
  p.stride_w = range(1, 3);
  p.top = range(0, 2);
  p.bottom = range(0, 2);
  p.left = range(0, 2);
  p.right = range(0, 2);
  p.out_h = ceil_out(p.height + p.top + p.bottom, p.kh, p.stride_h);
  p.out_w = ceil_out(p.width + p.left + p.right, p.kw, p.stride_w);
  return p;
}

void test_pools(const Kernel& k, RealPool p, bool special) {
  const bool count_padding = rng() & 1;
  const int64_t divisor = pick<int64_t>({0, 0, 3});
  p.dilation_h = range(1, 2);
  p.dilation_w = range(1, 2);
  parameters =
      text(k.name, "image", p.batch, p.height, p.width, p.channels, "window", p.kh, p.kw, "stride",
           p.stride_h, p.stride_w, "padding", p.top, p.bottom, p.left, p.right, "dilation",
           p.dilation_h, p.dilation_w, "out", p.out_h, p.out_w, count_padding, divisor, special);
  const Rows in = random_terms(p.batch * p.height * p.width, p.channels, special);
  Rows most(p.batch * p.out_h * p.out_w, p.channels);
  p.input = in.at();
  p.in_pixel = in.row;
  p.out = most.at();
  p.out_pixel = most.row;
  max_pool2d(k, p);
  const auto window = [&] {
    return Window{p.batch,    p.height, p.width, p.out_h,      p.out_w,     p.stride_h,
                  p.stride_w, p.top,    p.left,  p.dilation_h, p.dilation_w};
  };
  check_rows("max_pool2d", most, [&](int64_t pixel, int64_t c) {
    double y = -kInf;
    for (int64_t tap = 0; tap < p.kh * p.kw; ++tap) {
      const int64_t row = window().row(pixel, tap / p.kw, tap % p.kw);
      if (row >= 0 && !(in.get(row, c) <= y) && y == y) y = in.get(row, c);
    }
    return std::pair(y, 0.0);
  });

  p.dilation_h = p.dilation_w = 1;
  Rows mean(p.batch * p.out_h * p.out_w, p.channels);
  p.out = mean.at();
  p.out_pixel = mean.row;
  avg_pool2d(k, p, count_padding, divisor);
  check_rows("avg_pool2d", mean, [&](int64_t pixel, int64_t c) {
    const int64_t y = pixel / p.out_w % p.out_h * p.stride_h - p.top;
    const int64_t x = pixel % p.out_w * p.stride_w - p.left;
    double sum = 0, size = 0;
    int64_t inside = 0, padded = 0;
    for (int64_t tap = 0; tap < p.kh * p.kw; ++tap) {
      const int64_t row = window().row(pixel, tap / p.kw, tap % p.kw);
      padded += y + tap / p.kw < p.height + p.bottom && x + tap % p.kw < p.width + p.right;
      inside += row >= 0;
      if (row >= 0) sum += in.get(row, c), size += std::fabs(in.get(row, c));
    }
    const double count = static_cast<double>(divisor ? divisor : count_padding ? padded : inside);
    const double rounding = static_cast<double>(p.kh * p.kw + 1) * 0x1p-24;
    return inside ? std::pair(sum / count, rounding * size / count) : std::pair(0.0, 0.0);
  });

  p.out_h = pick<int64_t>({1, 1, 2, 5, p.height});
  p.out_w = pick<int64_t>({1, 1, 3, 7, p.width});
  Rows adaptive(p.batch * p.out_h * p.out_w, p.channels);
  p.out = adaptive.at();
  p.out_pixel = adaptive.row;
  adaptive_avg_pool2d(k, p);
  check_rows("adaptive_avg_pool2d", adaptive, [&](int64_t pixel, int64_t c) {
    const int64_t i = pixel / p.out_w % p.out_h, j = pixel % p.out_w;
    double sum = 0, size = 0, count = 0;
    for (int64_t y = i * p.height / p.out_h; y * p.out_h < (i + 1) * p.height; ++y)
      for (int64_t x = j * p.width / p.out_w; x * p.out_w < (j + 1) * p.width; ++x, ++count) {
        const double v = in.get((pixel / p.out_w / p.out_h * p.height + y) * p.width + x, c);
        sum += v;
        size += std::fabs(v);
      }
    return std::pair(sum / count, (count + 1) * 0x1p-24 * size / count);
  });
}

void test_rows(const Kernel& k, int64_t rows, int64_t channels, bool special) {
  const int parts = static_cast<int>(rng() & 31);  // scale, shift, y, slope, bounds
  const bool one_row = rng() & 1;
  parameters = text(k.name, rows, channels, "parts", parts, "one row", one_row, special);
  const Rows x = random_rows(rows, channels, special);
  const Rows y = random_rows(one_row ? 1 : rows, channels, special);
  const auto vector = [&] { return random_real(DType::kF32, channels + 32, special); };
  const Real scale = vector(), shift = vector(), slope = vector();
  Rows out(rows, channels);
  RowsJob job = {};
  job.rows = rows;
  job.channels = channels;
  job.x = x.at();
  job.x_row = x.row;
  if (parts & 4) job.y = y.at();
  job.y_row = one_row ? 0 : y.row;
  job.out = out.at();
  job.out_row = out.row;
  if (parts & 1) job.scale = scale.as<float>();
  if (parts & 2) job.shift = shift.as<float>();
  if (parts & 8) job.slope = slope.as<float>();
  if (parts & 16) job.lo = -0.5, job.hi = 1.5;
  const auto as_float = [](double v) { return static_cast<double>(static_cast<float>(v)); };
  const auto want = [&](int64_t r, int64_t c) {
    double v = x.get(r, c);
    if (parts & 1) v = as_float(v * scale.get(c));
    if (parts & 2) v = as_float(v + shift.get(c));
    if (parts & 4) v = as_float(v + y.get(one_row ? 0 : r, c));
    if (parts & 8 && !(v >= 0)) v = as_float(v * slope.get(c));
    return parts & 16 ? clamp(v, -0.5, 1.5) : v;
  };
  affine_rows(k, job);
  check_rows("affine_rows", out, [&](int64_t r, int64_t c) { return std::pair(want(r, c), 0.0); });

  Rows own(rows, channels, x.row);  // over its own operand
  std::memcpy(own.at(), x.at(), x.data.size * sizeof(float));
  job.x = job.out = own.at();
  job.out_row = own.row;
  affine_rows(k, job);
  check("affine_rows in place", rows * channels, [&](int64_t i) {
    return std::pair(own.get(i / channels, i % channels), want(i / channels, i % channels));
  });

  job.x = x.at();
  job.y = y.at();
  Rows product(rows, channels);
  job.out = product.at();
  job.out_row = product.row;
  multiply_rows(k, job);
  check_rows("multiply_rows", product, [&](int64_t r, int64_t c) {
    return std::pair(as_float(x.get(r, c) * y.get(one_row ? 0 : r, c)), 0.0);
  });

  Rows wide = random_rows(rows, channels, special), sigmoid(rows, channels);
  for (int64_t i = 0; i < wide.data.size; ++i) wide.data.set(i, 60 * wide.data.get(i));
  job.x = wide.at();
  job.x_row = wide.row;
  job.out = sigmoid.at();
  job.out_row = sigmoid.row;
  sigmoid_rows(k, job);
  check_rows("sigmoid_rows", sigmoid, [&](int64_t r, int64_t c) {
    const double v = 1 / (1 + std::exp(-wide.get(r, c)));
    const int exponent = v > 0 ? std::max(std::ilogb(v), -126) : -126;
    return std::pair(v, std::ldexp(2.0, exponent - 23));
  });

  const Rows planes = random_rows(channels, rows, special);
  Rows turned(rows, channels), back(channels, rows);
  planes_to_rows(planes.at(), planes.row, channels, rows, turned.at(), turned.row);
  rows_to_planes(turned.at(), turned.row, channels, rows, back.at(), back.row);
  check_rows("planes_to_rows", turned,
             [&](int64_t r, int64_t c) { return std::pair(planes.get(c, r), 0.0); });
  check_rows("rows_to_planes", back,
             [&](int64_t c, int64_t r) { return std::pair(planes.get(c, r), 0.0); });
}

}  // namespace

void test_real_layers(const Kernel& k) {
  for (int i = 0; i < cases(1500); ++i) test_conv2d(k, random_conv2d(), range(0, 4) == 0);
  test_conv2d(k, large_conv2d(2, 31, 1, 3, 40, 3, 2), false);
  test_conv2d(k, large_conv2d(1, 57, 1, 3, 16, 7, 2), false);
  test_conv2d(k, large_conv2d(2, 28, 1, 40, 72, 1, 1), false);
  test_conv2d(k, large_conv2d(3, 15, 3, 20, 33, 3, 1), false);
  test_conv2d(k, large_conv2d(1, 56, 70, 1, 1, 3, 1), false);
  test_conv2d(k, large_conv2d(1, 56, 64, 1, 1, 3, 2), false);
  for (const int64_t batch : {1, 2, 3, 5, 17})
    test_conv2d(k, large_conv2d(batch, 1, 1, 512, 1000, 1, 1), false);
  for (int i = 0; i < cases(600); ++i) test_pools(k, random_pool(false), i & 1);
  for (int i = 0; i < 6; ++i) test_pools(k, random_pool(true), i & 1);
  for (const int64_t channels : {1, 3, 5, 16, 17, 33, 64, 70})
    for (const int64_t rows : {0, 1, 5, 40})
      for (int i = 0; i < 24; ++i) test_rows(k, rows, channels, i & 1);
  for (int i = 0; i < 6; ++i) test_rows(k, 1300, 70, i & 1);
}

}  // namespace bitkernels
