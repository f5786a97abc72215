// Int8 layers against loops over single elements, every way of a kernel: sums are exact, so that
// results are the same bit for bit.
#include "cpu/int8_conv2d.h"
#include "kernel_test_real.h"

namespace bitkernels {
namespace {

// Half to even by its definition, whatever the machine's rounding.
int quantized(double x, float steps) {
  const double v = static_cast<float>(static_cast<float>(x) * steps);
  if (v != v) return 0;
  if (std::fabs(v) >= 127) return v < 0 ? -127 : 127;
  const double down = std::floor(v), rest = v - down;
  const bool up = rest > 0.5 || (rest == 0.5 && std::fmod(down, 2) != 0);
  return static_cast<int>(down) + up;
}

void test_int8_conv2d(const Kernel& k, const Int8Dot& dot, const RealConv& given, bool extreme) {
  Int8Conv conv = {};
  RealConv& c = conv.layer = given;
  const int64_t cin = c.groups * c.channels, cout = c.groups * c.out_channels;
  const int64_t taps = c.kh * c.kw;
  const bool bounds = rng() & 1, with_bias = rng() & 1;
  parameters = text(k.name, dot.name, "image", c.batch, c.height, c.width, "groups", c.groups,
                    "channels", c.channels, c.out_channels, "filter", c.kh, c.kw, "stride",
                    c.stride_h, c.stride_w, "padding", c.top, c.left, "dilation", c.dilation_h,
                    c.dilation_w, "out", c.out_h, c.out_w, extreme);
  // Steps of 2 put many values at halves; values of 2 and more saturate steps of 100.
  conv.steps = extreme ? 1000.0f : pick({2.0f, 37.3f, 100.0f});
  Rows in = random_rows(c.batch * c.height * c.width, cin, range(0, 2) == 0);
  for (int64_t i = 0; i < in.data.size; ++i) {
    if (conv.steps == 2) in.data.set(i, std::nearbyint(in.data.get(i) * 64) / 4);
    if (extreme) in.data.set(i, i % 7 ? 1 : -1);
    if (std::isnan(in.data.get(i)))  // of any bits
      in.data.as<uint32_t>()[i] = 0x7fc00000u | static_cast<uint32_t>(rng() & 0x803fffff);
  }
  std::unique_ptr<int8_t[]> weight(new int8_t[cout * c.channels * taps]);
  for (int64_t i = 0; i < cout * c.channels * taps; ++i)
    weight[i] = static_cast<int8_t>(extreme ? (i % 5 ? -128 : 127) : range(-128, 127));
  const Real scale = random_real(DType::kF32, cout, false);
  const Real bias = random_real(DType::kF32, cout, false);
  std::unique_ptr<int32_t[]> arranged(new int32_t[arranged_int8_size(dot, c)]);
  arrange_int8_conv2d(dot, c, weight.get(), arranged.get());
  std::unique_ptr<int32_t[]> memory(new int32_t[int8_input_size(dot, c)]);
  c.input = in.at();
  c.in_pixel = in.row;
  if (with_bias) c.bias = bias.as<float>();
  if (bounds) c.lo = -0.5f, c.hi = 1.5f;
  conv.weight = arranged.get();
  conv.scale = scale.as<float>();
  conv.quantized = memory.get();
  Rows out(c.batch * c.out_h * c.out_w, cout), again(out.rows, cout, out.row);
  c.out = out.at();
  c.out_pixel = out.row;
  int8_conv2d(dot, conv);

  const Window window = {c.batch,    c.height, c.width, c.out_h,      c.out_w,     c.stride_h,
                         c.stride_w, c.top,    c.left,  c.dilation_h, c.dilation_w};
  check_rows("int8_conv2d", out, [&](int64_t pixel, int64_t o) {
    int64_t sum = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = window.row(pixel, tap / c.kw, tap % c.kw);
      for (int64_t i = 0; row >= 0 && i < c.channels; ++i)
        sum += quantized(in.get(row, o / c.out_channels * c.channels + i), conv.steps) *
               weight[(o * c.channels + i) * taps + tap];
    }
    float y = static_cast<float>(static_cast<float>(sum) * scale.get(o));
    if (with_bias) y = static_cast<float>(static_cast<double>(y) + bias.get(o));
    return std::pair(static_cast<double>(y < c.lo ? c.lo : y > c.hi ? c.hi : y), 0.0);
  });
  threads = 1;
  c.out = again.at();
  int8_conv2d(dot, conv);
  threads = 3;
  check_same("int8_conv2d of one thread and of three", out, again);
}

}  // namespace

void test_int8_layers(const Kernel& k) {
  for (const Int8Dot* dot : k.int8) {
    if (!dot || !dot->supported()) continue;
    const auto test = [&](const RealConv& c, bool extreme = false) {
      test_int8_conv2d(k, *dot, c, extreme);
    };
    for (int i = 0; i < cases(700); ++i) test(random_conv2d());
    for (int i = 0; i < cases(60); ++i) test(random_conv2d(), true);
    test(large_conv2d(2, 31, 1, 3, 40, 3, 2));
    test(large_conv2d(2, 28, 1, 40, 72, 1, 1));
    test(large_conv2d(3, 15, 3, 20, 33, 3, 1));
    test(large_conv2d(2, 29, 2, 18, 35, 1, 2));
    for (const int64_t batch : {1, 2, 3, 5, 17}) test(large_conv2d(batch, 1, 1, 512, 1000, 1, 1));
    // The longest sums: beyond 2^31 in magnitude while 128 is added to activations.
    test(large_conv2d(1, 1, 1, kMostInt8Products, 17, 1, 1), true);
  }
}

}  // namespace bitkernels
