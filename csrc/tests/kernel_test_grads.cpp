// Gradients of convolutions from bits. Output gradients are multiples of 1/4, so that sums are
// exact in every order.
#include "cpu/packed_conv2d_input_grad.h"
#include "cpu/packed_conv2d_weight_grad.h"
#include "kernel_test.h"

namespace bitkernels {
namespace {

Real quarters(DType type, int64_t n) {
  Real x(type, n);
  for (int64_t i = 0; i < n; ++i) x.set(i, static_cast<double>(range(-16, 16)) / 4);
  return x;
}

// Calls f(output pixel, input pixel or -1 outside the image) for a filter tap.
template <class F>
void for_pixels(const Conv& c, int64_t ky, int64_t kx, const F& f) {
  for (int64_t i = 0; i < c.batch * c.out_h * c.out_w; ++i) {
    const int64_t y = i / c.out_w % c.out_h * c.stride_h - c.top + ky * c.dilation_h;
    const int64_t x = i % c.out_w * c.stride_w - c.left + kx * c.dilation_w;
    const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
    f(i, inside ? (i / c.out_w / c.out_h * c.height + y) * c.width + x : -1);
  }
}

void test_weight_grad(const Kernel& k, DType type, Conv c) {
  threads = pick({1, 3});
  parameters = text(k.name, "weight_grad", c.batch, c.height, c.width, c.channels, c.out_channels,
                    c.kh, c.kw, c.stride_h, c.stride_w, c.top, c.left, c.pad_value);
  const Words in = random_words(c.batch * c.height * c.width, c.channels);
  const Real grad = quarters(type, c.batch * c.out_h * c.out_w * c.out_channels);
  const int64_t taps = c.kh * c.kw, words = word_count(c.channels);
  Real out(DType::kF32, c.out_channels * taps * c.channels), want = quarters(out.type, out.size);
  for (int64_t i = 0; i < want.size; ++i) {
    const int64_t channel = i % c.channels, tap = i / c.channels % taps, o = i / c.channels / taps;
    double sum = 0;
    for_pixels(c, tap / c.kw, tap % c.kw, [&](int64_t pixel, int64_t from) {
      const int sign = from < 0 ? c.pad_value : in.bit(from, words, channel) ? 1 : -1;
      sum += grad.get(pixel * c.out_channels + o) * sign;
    });
    want.set(i, sum);
  }
  c.input = in.data.get();
  packed_conv2d_weight_grad(k, c, grad.data(), type, out.as<float>());
  check("weight gradient", out.size,
        [&](int64_t i) { return std::pair(out.get(i) + 0.0, want.get(i) + 0.0); });
}

void test_input_grad(const Kernel& k, DType type, Conv c, bool scaled) {
  threads = pick({1, 3});
  c.stride_h = c.stride_w = 1;
  c.out_h = out_size(c.height, c.top + c.bottom, c.kh, 1, c.dilation_h);
  c.out_w = out_size(c.width, c.left + c.right, c.kw, 1, c.dilation_w);
  parameters = text(k.name, "input_grad", c.batch, c.height, c.width, c.channels, c.out_channels,
                    c.kh, c.kw, c.dilation_h, c.dilation_w, c.top, c.bottom, c.left, c.right);
  const int64_t taps = c.kh * c.kw, words = word_count(c.channels);
  const Words weight = random_words(c.out_channels * taps, c.channels);
  const Real grad = quarters(type, c.batch * c.out_h * c.out_w * c.out_channels);
  std::vector<float> scale(c.out_channels);
  for (float& s : scale) s = pick({0.5f, 1.0f, 2.0f});
  std::vector<double> sums(c.batch * c.height * c.width * c.channels, 0.0);
  for (int64_t tap = 0; tap < taps; ++tap)
    for_pixels(c, tap / c.kw, tap % c.kw, [&](int64_t pixel, int64_t to) {
      for (int64_t o = 0; to >= 0 && o < c.out_channels; ++o) {
        const double g = grad.get(pixel * c.out_channels + o) * (scaled ? scale[o] : 1);
        for (int64_t i = 0; i < c.channels; ++i)
          sums[to * c.channels + i] += weight.bit(o * taps + tap, words, i) ? g : -g;
      }
    });
  Real out(type, static_cast<int64_t>(sums.size())), want(type, out.size);
  for (int64_t i = 0; i < want.size; ++i) want.set(i, sums[i]);
  packed_conv2d_input_grad(k, c, weight.data.get(), scaled ? scale.data() : nullptr, grad.data(),
                           type, out.data());
  check("input gradient", out.size,
        [&](int64_t i) { return std::pair(out.get(i) + 0.0, want.get(i) + 0.0); });
}

Conv one_group(Conv c) {
  c.groups = 1;
  return c;
}

}  // namespace

void test_gradients(const Kernel& k) {
  for (int i = 0; i < cases(400); ++i) {
    const DType type = kTypes[i % 3];
    test_weight_grad(k, type, one_group(random_conv()));
    test_input_grad(k, type, one_group(random_conv()), i & 1);
  }
  for (int i = 0; i < 4; ++i) {
    test_weight_grad(k, DType::kF32, one_group(kLarge[i]));
    test_input_grad(k, DType::kF32, one_group(kLarge[i]), i & 1);
  }
  Conv wide = one_group(kLarge[0]);  // more offsets than one block of pixels holds
  wide.channels = 600;
  wide.kh = wide.kw = 5;
  wide.top = wide.bottom = wide.left = wide.right = 2;
  wide.out_channels = 16;
  test_weight_grad(k, DType::kF32, wide);
}

}  // namespace bitkernels
