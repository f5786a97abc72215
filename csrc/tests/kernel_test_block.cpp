// The passes of a residual block, and the sums that a convolution takes on its way out, against
// loops over single elements.
#include "cpu/residual_block.h"
#include "cpu/sign_backward.h"
#include "cpu/tile_weight.h"
#include "kernel_test.h"

namespace bitkernels {
namespace {

// f(threads) for one thread and for three; what it returns must be the same bit for bit.
template <class F>
std::vector<double> of_any_threads(const char* what, const F& f) {
  threads = 1;
  const std::vector<double> one = f();
  threads = 3;
  const std::vector<double> three = f();
  check(what, static_cast<int64_t>(one.size()),
        [&](int64_t i) { return std::pair(one[i], three[i]); });
  return three;
}

// Sums are taken in the vectors' type, in tasks; `size` is the sum of the terms' magnitudes.
void check_sums(const char* what, DType type, const std::vector<double>& got,
                const std::vector<double>& want, const std::vector<double>& size) {
  const double tolerance = type == DType::kF64 ? 0x1p-40 : 1e-4;
  check(what, static_cast<int64_t>(got.size()), [&](int64_t i) {
    const bool close = std::fabs(got[i] - want[i]) <= tolerance * size[i];
    return std::pair(got[i], close ? got[i] : want[i]);
  });
}

struct Sums {
  int64_t channels;
  std::vector<double> total, size;
  Sums(int64_t kinds, int64_t c) : channels(c), total(kinds * c), size(kinds * c) {}
  void add(int64_t kind, int64_t channel, double term) {
    total[kind * channels + channel] += term;
    size[kind * channels + channel] += std::fabs(term);
  }
};

void test_passes(const Kernel& k, DType type, int64_t rows, int64_t channels, bool special) {
  const DType w = wide_type(type);
  const int parts = static_cast<int>(rng() & 7);  // shift_in, shift_out, slope
  const bool short_dot = rng() & 1, relu = rng() & 1, slope = parts & 4;
  const DType out_type = type == DType::kF64 ? type : kTypes[range(0, 2)];
  parameters = text(k.name, "type", static_cast<int>(type), "to", static_cast<int>(out_type), rows,
                    channels, "parts", parts, "short", short_dot, "relu", relu, special);
  const int64_t n = rows * channels;
  std::unique_ptr<int16_t[]> shorts(new int16_t[n]);
  std::unique_ptr<int32_t[]> ints(new int32_t[n]);
  for (int64_t i = 0; i < n; ++i) {
    ints[i] = static_cast<int32_t>(pick<int64_t>({0, 1, -1, range(-300, 300), -32767, 32767}));
    shorts[i] = static_cast<int16_t>(ints[i]);
  }
  const Real residual = random_real(type, n, special), grad = random_real(type, n, special);
  std::vector<Real> vectors;
  for (int i = 0; i < 9; ++i) vectors.push_back(random_real(w, channels + 32, special && i < 5));

  BlockRows b;
  b.rows = rows;
  b.channels = channels;
  b.dot = short_dot ? static_cast<const void*>(shorts.get()) : ints.get();
  b.short_dot = short_dot;
  b.relu = relu;
  b.type = b.out_type = type;
  b.residual = residual.data();
  b.grad = grad.data();
  b.scale = vectors[0].data();
  b.bias = vectors[1].data();
  if (parts & 1) b.shift_in = vectors[2].data();
  if (parts & 2) b.shift_out = vectors[3].data();
  if (slope) b.slope = vectors[4].data();
  b.center = vectors[5].data();
  b.p = vectors[6].data();
  b.q = vectors[7].data();
  b.r = vectors[8].data();

  const auto at = [&](int vector, int64_t i) { return vectors[vector].get(i % channels); };
  const auto dot = [&](int64_t i) { return relu && ints[i] < 0 ? 0.0 : ints[i]; };
  const auto value = [&](int64_t i) {
    double y = wide(w, wide(w, dot(i) * at(0, i)) + at(1, i));
    y = wide(w, y + residual.get(i));
    return parts & 1 ? wide(w, y + at(2, i)) : y;
  };

  Real out(type, n), want(type, n);
  b.out = out.data();
  block_forward(k, b);
  for (int64_t i = 0; i < n; ++i) {
    double y = value(i);
    if (slope && !(y > 0)) y = wide(w, y * at(4, i));
    want.set(i, parts & 2 ? wide(w, y + at(3, i)) : y);
  }
  check_real("block_forward", out, want);

  Real down(type, n), want_down(type, n);
  b.out = slope ? down.data() : nullptr;
  if (!slope) b.residual = nullptr;
  const auto sums = of_any_threads("block_backward sums of one thread and of three", [&] {
    std::vector<double> total(4 * channels);
    block_backward(k, b, total.data());
    return total;
  });
  Sums expected(4, channels);
  for (int64_t i = 0; i < n; ++i) {
    double g = grad.get(i);
    if (slope) {
      const double y = value(i);
      expected.add(3, i % channels, g);
      expected.add(2, i % channels, y > 0 ? 0 : g * y);
      if (!(y > 0)) g = wide(w, g * at(4, i));
      want_down.set(i, g);
    }
    expected.add(0, i % channels, g);
    expected.add(1, i % channels, g * wide(w, dot(i) - at(5, i)));
  }
  check_real("block_backward", down, want_down);  // both untouched without a slope
  if (!special) check_sums("block_backward sums", type, sums, expected.total, expected.size);

  Real into(out_type, n), want_into(out_type, n);
  b.out = into.data();
  b.out_type = out_type;
  norm_backward(k, b);
  for (int64_t i = 0; i < n; ++i) {
    const double d = wide(w, wide(w, dot(i) - at(5, i)) * at(7, i));
    const double y = wide(w, wide(w, wide(w, grad.get(i) * at(6, i)) + d) + at(8, i));
    want_into.set(i, relu && ints[i] <= 0 ? 0 : y);
  }
  check_real("norm_backward", into, want_into);
}

void test_sign_backward(const Kernel& k, DType type, int64_t outer, int64_t channels, int64_t inner,
                        Estimator estimator, bool special) {
  const DType w = wide_type(type), grad_type = w == DType::kF64 ? w : kTypes[range(0, 2)];
  const bool shifted = rng() & 1, added = rng() & 1;
  parameters = text(k.name, "type", static_cast<int>(type), "of", static_cast<int>(grad_type),
                    outer, channels, inner, "estimator", static_cast<int>(estimator), "shift",
                    shifted, "add", added, "special", special);
  const int64_t n = outer * channels * inner;
  const Real x = random_real(type, n, special), grad = random_real(grad_type, n, special);
  const Real add = random_real(type, n, special), shift = random_real(w, channels + 32, special);
  Real out(type, n), want(type, n);
  SignBackward s;
  s.grad = grad.data();
  s.x = x.data();
  s.add = added ? add.data() : nullptr;
  s.grad_type = grad_type;
  s.type = type;
  s.shift = shifted ? shift.data() : nullptr;
  s.estimator = estimator;
  s.clip = 1.25;
  s.beta = 3;
  s.out = out.data();
  const auto sums = of_any_threads("sign_backward sums of one thread and of three", [&] {
    std::vector<double> total(channels);
    sign_backward(k, s, outer, channels, inner, total.data());
    return total;
  });
  Sums expected(1, channels);
  bool exact = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = i / inner % channels;
    const double y = shifted ? wide(w, x.get(i) + shift.get(c)) : x.get(i), size = std::fabs(y);
    double g = grad.get(i);
    if (estimator == Estimator::kSte) g = size <= 1.25 ? g : 0;
    if (estimator == Estimator::kApprox)
      g = size <= 1 ? wide(w, g * wide(w, 2 - wide(w, 2 * size))) : 0;
    if (estimator == Estimator::kSwish) {
      exact = false;  // exponentials are approximate
      const double by = 3 * y;
      g *= std::fabs(by) < 80 ? 3 * (2 - by * std::tanh(by / 2)) / (1 + std::cosh(by)) : 0;
      g = wide(w, g);
    }
    expected.add(0, c, g);
    want.set(i, added ? wide(w, g + add.get(i)) : g);
  }
  if (exact) {
    check_real("sign_backward", out, want);
  } else {
    const double unit = size_of(type) == 2 ? 0x1p-6 : 1e-5;
    check("sign_backward", n, [&](int64_t i) {
      const double a = out.get(i), b = want.get(i), g = std::fabs(grad.get(i));
      const double most = std::isfinite(g) ? unit * (1 + g + std::fabs(b)) : 0;
      return std::pair(a, std::fabs(a - b) <= most ? a : b);
    });
  }
  if (!special) check_sums("sign_backward sums", type, sums, expected.total, expected.size);
}

// Dot products beside each other and their moments. alike: every product -1, the largest squares.
void test_moments(const Kernel& k, Conv c, bool alike) {
  const int64_t cout = c.groups * c.out_channels, pixels = c.batch * c.out_h * c.out_w;
  const bool fits = c.kh * c.kw * c.channels <= INT16_MAX, relu = rng() & 1;
  const bool short_out = fits && range(0, 3) > 0;
  threads = pick({1, 3});
  parameters = text(k.name, "image", c.batch, c.height, c.width, "groups", c.groups, "channels",
                    c.channels, c.out_channels, "filter", c.kh, c.kw, "stride", c.stride_h,
                    c.stride_w, "padding", c.top, c.bottom, c.left, c.right, "of", c.pad_value,
                    "short", short_out, "relu", relu, "alike", alike, threads);
  const int64_t taps = c.kh * c.kw * word_count(c.channels), per_group = (c.out_channels + 15) / 16;
  const Words in = random_words(c.batch * c.height * c.width, c.groups * c.channels, alike);
  const Words weight = random_words(cout * c.kh * c.kw, c.channels, alike ? -1 : 0);
  Words tiles(c.groups * per_group * taps * 16);
  tile_weight(weight.data.get(), c.groups, c.out_channels, taps, tiles.data.get());
  c.input = in.data.get();
  c.tiles = tiles.data.get();
  const int64_t size = short_out ? 2 : 4;
  std::unique_ptr<char[]> dots(new char[pixels * cout * size]);
  std::unique_ptr<int64_t[]> moments(new int64_t[2 * cout]());
  Epilogue e;
  e.out = dots.get();
  e.out_short = short_out;
  e.relu = relu;
  e.moments = moments.get();
  const Strides rows = {c.out_h * c.out_w * cout, 1, c.out_w * cout, cout};
  packed_conv2d(k, c, e, rows, rows);
  threads = 3;
  std::vector<int64_t> want(2 * cout);
  check("dot products with moments", pixels * cout, [&](int64_t i) {
    const int64_t o = i % cout;
    const int32_t dot = naive_dot(c, in, weight, i / cout, o);
    const int64_t counted = relu ? std::max(dot, 0) : dot;
    want[o] += counted;
    want[cout + o] += counted * counted;
    int16_t low;
    int32_t all;
    std::memcpy(&low, dots.get() + i * size, sizeof low);
    if (!short_out) std::memcpy(&all, dots.get() + i * size, sizeof all);
    return std::pair(short_out ? int32_t{low} : all, dot);
  });
  check("moments", 2 * cout, [&](int64_t i) { return std::pair(moments[i], want[i]); });
}

// 1x1 over a row of pixels: `products` of them a dot product.
Conv wide_conv(int64_t products, int64_t out_channels) {
  return {1, 1, 13, 1, products, out_channels, 1, 1,       1,      1, 0, 0,
          0, 0, 1,  1, 1,        13,           0, nullptr, nullptr};
}

}  // namespace

void test_block_passes(const Kernel& k) {
  for (const DType type : kTypes) {
    for (const int64_t channels : {1, 7, 16, 17, 32, 40, 64})
      for (const int64_t rows : {0, 1, 5, 33})
        for (int i = 0; i < 6; ++i) test_passes(k, type, rows, channels, i & 1);
    for (int i = 0; i < 4; ++i) test_passes(k, type, 1300, 40, false);  // several tasks
    for (int i = 0; i < 4; ++i) test_passes(k, type, 70, 4101, false);  // which share channels
    for (const auto estimator :
         {Estimator::kSte, Estimator::kApprox, Estimator::kSwish, Estimator::kIdentity}) {
      for (const int64_t channels : {1, 16, 33})
        for (const int64_t inner : {1, 16, 37})
          for (int i = 0; i < 4; ++i)
            test_sign_backward(k, type, i, channels, inner, estimator, i & 1);
      test_sign_backward(k, type, 1300, 40, 1, estimator, false);
      test_sign_backward(k, type, 70, 4101, 1, estimator, false);
      test_sign_backward(k, type, 2, 3, 20000, estimator, false);
    }
  }
  for (int i = 0; i < cases(300); ++i) test_moments(k, random_conv(), range(0, 9) == 0);
  for (int i = 0; i < cases(60); ++i) test_moments(k, depthwise_conv(), range(0, 9) == 0);
  for (int i = 0; i < 8; ++i) test_moments(k, kLarge[i % 4], false);
  for (const int64_t products : {23170, 23171, 32767, 32768, 70000})
    for (int i = 0; i < 2; ++i) test_moments(k, wide_conv(products, 17), i);
}

}  // namespace bitkernels
