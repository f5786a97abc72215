// Stand-alone test of the CPU engine: every kernel that this machine supports against loops that
// take one bit at a time. Buffers are exactly as long as the headers state, for the sanitizers.
#include "kernel_test.h"

#include <cstdlib>
#include <thread>

#include "cpu/mask_grad.h"
#include "cpu/packed_max_pool2d.h"
#include "cpu/parallel.h"
#include "cpu/residual_block.h"
#include "cpu/rprelu.h"
#include "cpu/rsign.h"
#include "cpu/sign_backward.h"
#include "cpu/sign_pack.h"
#include "cpu/tile_weight.h"
#include "cpu/unpack.h"

namespace bitkernels {

int parallel_threads() { return threads; }

// One thread does the ranges of several, the last first: no range may rely on an earlier one. Built
// with -DREAL_THREADS, for the thread sanitizer, each range has a thread.
void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t size = std::max(grain, (n + threads - 1) / threads);
#ifdef REAL_THREADS
  std::vector<std::thread> running;
  for (int64_t begin = 0; begin < n; begin += size)
    running.emplace_back(body, begin, std::min(begin + size, n), context);
  for (std::thread& thread : running) thread.join();
#else
  for (int64_t begin = (n - 1) / size * size; begin >= 0; begin -= size)
    body(begin, std::min(begin + size, n), context);
#endif
}

namespace {

void test_bits(const Kernel& k, DType type, int64_t outer, int64_t channels, int64_t inner,
               bool shifted, bool masked) {
  const double clip = pick({0.0, 1.25, kInf});
  const int64_t samples = rng() & 1 ? std::max<int64_t>(outer, 1) : 1;
  parameters = text(k.name, "type", static_cast<int>(type), outer, channels, inner, "shift",
                    shifted, "samples", samples, "mask", masked, "clip", clip);
  const int64_t rows = outer * inner, size = rows * channels, words = word_count(channels);
  const Real x = random_real(type, size, true);
  const Real shift = random_real(wide_type(type), samples * channels + 32, true);
  Words signs(rows * words), mask(rows * words);
  sign_pack(k, x.data(), type, outer, channels, inner, shifted ? shift.data() : nullptr, samples,
            clip, signs.data.get(), masked ? mask.data.get() : nullptr);
  const auto value = [&](int64_t row, int64_t c) {
    const double real = x.get((row / inner * channels + c) * inner + row % inner);
    const int64_t sample = samples > 1 ? row / inner : 0;
    return shifted ? wide(type, real + shift.get(sample * channels + c)) : real;
  };
  check_words("sign_pack", signs, channels,
              [&](int64_t row, int64_t c) { return !(value(row, c) < 0); });
  if (masked)
    check_words("sign_pack mask", mask, channels,
                [&](int64_t row, int64_t c) { return std::fabs(value(row, c)) <= clip; });

  const Words bits = random_words(rows, channels);
  Real out(type, size);
  mask_grad(k, x.data(), type, outer, channels, inner, bits.data.get(), out.data());
  check("mask_grad", size, [&](int64_t i) {
    const int64_t row = i / inner / channels * inner + i % inner;
    const bool bit = bits.bit(row, words, i / inner % channels);
    return std::pair(out.bits(i), bit ? x.bits(i) : 0);
  });
  unpack(k, bits.data.get(), type, rows, channels, out.data());
  check("unpack", size, [&](int64_t i) {
    return std::pair(out.get(i), bits.bit(i / channels, words, i % channels) ? 1.0 : -1.0);
  });
}

void test_activations(const Kernel& k, DType type, int64_t outer, int64_t channels, int64_t inner,
                      bool special) {
  parameters =
      text(k.name, "type", static_cast<int>(type), outer, channels, inner, "special", special);
  const DType w = wide_type(type);
  const int64_t n = outer * channels * inner, padded = channels + 16;
  const Real x = random_real(type, n, special), grad = random_real(type, n, special),
             shift_in = random_real(w, padded, special), slope = random_real(w, padded, special),
             shift_out = random_real(w, padded, special);
  Real out(type, n), want(type, n);
  const auto channel = [&](int64_t i) { return i / inner % channels; };
  const auto shifted = [&](int64_t i) { return wide(w, x.get(i) + shift_in.get(channel(i))); };

  rsign(k, x.data(), type, outer, channels, inner, shift_in.data(), 1, out.data());
  for (int64_t i = 0; i < n; ++i) want.set(i, shifted(i) < 0 ? -1 : 1);
  check_real("rsign", out, want);
  const Real shifts = random_real(w, outer * channels + 16, special);
  rsign(k, x.data(), type, outer, channels, inner, shifts.data(), std::max<int64_t>(outer, 1),
        out.data());
  for (int64_t i = 0; i < n; ++i)
    want.set(i, wide(w, x.get(i) + shifts.get(i / inner)) < 0 ? -1 : 1);
  check_real("rsign of samples", out, want);

  rprelu(k, x.data(), type, outer, channels, inner, shift_in.data(), slope.data(), shift_out.data(),
         out.data());
  for (int64_t i = 0; i < n; ++i) {
    const double y = shifted(i), bent = y > 0 ? y : wide(w, y * slope.get(channel(i)));
    want.set(i, wide(w, bent + shift_out.get(channel(i))));
  }
  check_real("rprelu", out, want);

  Real sums(DType::kF32, 3 * channels), sums_of_one(DType::kF32, 3 * channels);
  for (const int t : {1, 3}) {
    threads = t;
    rprelu_backward(k, grad.data(), x.data(), type, outer, channels, inner, shift_in.data(),
                    slope.data(), out.data(), (t == 1 ? sums_of_one : sums).as<float>());
  }
  std::vector<double> total(3 * channels), size(3 * channels);
  for (int64_t i = 0; i < n; ++i) {
    const double y = shifted(i), g = grad.get(i);
    const double down = y > 0 ? g : wide(w, g * slope.get(channel(i)));
    want.set(i, down);
    const double terms[] = {down, y > 0 ? 0 : g * y, g};
    for (int part = 0; part < 3; ++part) {
      total[part * channels + channel(i)] += terms[part];
      size[part * channels + channel(i)] += std::fabs(terms[part]);
    }
  }
  check_real("rprelu_backward", out, want);
  check_real("rprelu_backward sums of one thread and of three", sums_of_one, sums);
  if (special) return;
  const double tolerance = type == DType::kF64 ? 0x1p-23 : 1e-4;
  check("rprelu_backward sums", 3 * channels, [&](int64_t i) {
    const bool close = std::fabs(sums.get(i) - total[i]) <= tolerance * size[i];
    return std::pair(sums.get(i), close ? sums.get(i) : total[i]);
  });
}

// Of an output or residual: channels last, planar, channels last with gaps, one pixel for all.
Strides strides_of(int64_t layout, int64_t channels, int64_t h, int64_t w) {
  const int64_t pixel = channels + (layout == 2 ? 3 : 0), row = pixel * w + (layout == 2 ? 5 : 0);
  if (layout == 1) return {channels * h * w, h * w, w, 1};
  return layout == 3 ? Strides{0, 1, 0, 0} : Strides{row * h, 1, row, pixel};
}

// So many rows that a task adds up several steps of them.
void test_sums_of_many_rows(const Kernel& k) {
  const int64_t rows = 16500, channels = 256, n = rows * channels;
  parameters = text(k.name, rows, channels);
  Real ones(DType::kF32, n), vector(DType::kF32, channels + 16), out(DType::kF32, n);
  std::fill_n(ones.as<float>(), n, 1.0f);
  std::fill_n(vector.as<float>(), channels + 16, -2.0f);  // every value is -1
  std::vector<float> sums(3 * channels);
  rprelu_backward(k, ones.data(), ones.data(), DType::kF32, rows, channels, 1, vector.data(),
                  vector.data(), out.data(), sums.data());
  check("rprelu_backward sums of many rows", 3 * channels, [&](int64_t i) {
    return std::pair(sums[i], static_cast<float>(i / channels == 0   ? -2 * rows
                                                 : i / channels == 1 ? -rows
                                                                     : rows));
  });
  SignBackward s;
  s.grad = s.x = ones.data();
  s.grad_type = s.type = DType::kF32;
  s.estimator = Estimator::kIdentity;
  s.out = out.data();
  std::vector<double> total(channels);
  sign_backward(k, s, rows, channels, 1, total.data());
  check("sign_backward sums of many rows", channels,
        [&](int64_t c) { return std::pair(total[c], static_cast<double>(rows)); });
}

// rows: of float32, channels next to each other, as networks have them.
void test_conv(const Kernel& k, Conv c, bool rows = false) {
  const int64_t cout = c.groups * c.out_channels, pixels = c.batch * c.out_h * c.out_w;
  const bool alike = range(0, 9) == 0;  // every product -1: the largest popcounts
  const int kind = rows ? 2 : static_cast<int>(range(0, 5));  // thresholds, int, type of kTypes
  const DType type = kind < 2 ? DType::kF32 : kTypes[kind - 2];
  const DType residual_type = rows ? DType::kF32 : kTypes[range(0, 3)];
  int parts = kind < 2 ? 0 : pick({0, 1 << range(0, 7), 255, static_cast<int>(rng() & 255)});
  if (parts & 3) parts |= 4;                            // no shift_in, shift_out without slope
  const int64_t outputs = kind == 0 ? 2 : range(1, 3);  // real 1, words 2
  const int64_t layout = rows ? pick<int64_t>({0, 2}) : range(0, 2);
  const int64_t residual_layout = rows ? pick<int64_t>({0, 2, 3}) : range(0, 3);
  threads = pick({1, 3});
  parameters = text(k.name, "image", c.batch, c.height, c.width, "groups", c.groups, "channels",
                    c.channels, c.out_channels, "filter", c.kh, c.kw, "stride", c.stride_h,
                    c.stride_w, "padding", c.top, c.bottom, c.left, c.right, "of", c.pad_value,
                    "dilation", c.dilation_h, c.dilation_w, "kind", kind, "parts", parts, "outputs",
                    outputs, "layout", layout, residual_layout, int(residual_type), alike, threads);

  const int64_t taps = c.kh * c.kw * word_count(c.channels), per_group = (c.out_channels + 15) / 16;
  const Words in = random_words(c.batch * c.height * c.width, c.groups * c.channels, alike ? 1 : 0);
  const Words weight = random_words(cout * c.kh * c.kw, c.channels, alike ? -1 : 0);
  Words tiles(c.groups * per_group * taps * 16), words(pixels * word_count(cout));
  tile_weight(weight.data.get(), c.groups, c.out_channels, taps, tiles.data.get());
  check("tile_weight", tiles.size, [&](int64_t i) {
    const int64_t tile = i / 16 / taps, o = tile % per_group * 16 + i % 16;
    const int64_t word = (tile / per_group * c.out_channels + o) * taps + i / 16 % taps;
    return std::pair(tiles.data[i], o < c.out_channels ? weight.data[word] : 0);
  });
  c.input = in.data.get();
  c.tiles = tiles.data.get();

  const Strides out = strides_of(layout, cout, c.out_h, c.out_w);
  const Strides res = strides_of(residual_layout, cout, c.out_h, c.out_w);
  const auto at = [&](const Strides& s, int64_t pixel, int64_t o) {
    const int64_t y = pixel / c.out_w % c.out_h, x = pixel % c.out_w;
    return pixel / c.out_w / c.out_h * s.n + o * s.c + y * s.h + x * s.w;
  };
  const int64_t any = pixels > 0, extent = any * (at(out, pixels - 1, cout - 1) + 1);
  Real got(type, extent), want(type, extent);
  const Real residual = random_real(residual_type, any * (at(res, pixels - 1, cout - 1) + 1), true);

  Epilogue e;
  std::vector<Real> vectors;
  int bit = 0;
  for (auto member : {&Epilogue::shift_in, &Epilogue::shift_out, &Epilogue::slope, &Epilogue::scale,
                      &Epilogue::bias, &Epilogue::sign_shift}) {
    vectors.push_back(random_real(DType::kF32, cout + 32, member == &Epilogue::sign_shift));
    if (parts >> bit++ & 1) e.*member = vectors.back().as<float>();
  }
  e.clamp = parts >> 6 & 1;
  e.lo = pick({-static_cast<float>(kInf), -2.5f, 1.0f});
  e.hi = pick({static_cast<float>(kInf), 3.5f, 1.0f});
  e.residual = parts >> 7 & 1 ? residual.data() : nullptr;
  e.residual_type = residual_type;
  e.residual_channel = res.c;
  if (e.residual && c.groups == 1 && cout > 32) e.residual_repeats = 32 * range(0, cout / 32);
  const int64_t repeats = e.residual_repeats ? e.residual_repeats : cout;
  std::unique_ptr<int32_t[]> lo(new int32_t[cout + 32]), hi(new int32_t[cout + 32]);
  for (int64_t i = 0; i < cout + 32; ++i) {
    lo[i] = pick<int32_t>({INT32_MIN, -20, -3, 0, 2, INT32_MAX});
    hi[i] = pick<int32_t>({INT32_MIN, -7, 0, 1, 25, INT32_MAX});
  }
  e.t_lo = kind == 0 ? lo.get() : nullptr;
  e.t_hi = kind == 0 ? hi.get() : nullptr;
  e.out = outputs & 1 ? got.data() : nullptr;
  e.out_int = kind == 1 && e.out;
  e.out_type = type;
  e.out_channel = out.c;
  e.words = outputs & 2 ? words.data.get() : nullptr;
  packed_conv2d(k, c, e, out, res);
  threads = 3;

  std::vector<bool> bits(pixels * cout);
  for (int64_t i = 0; i < pixels * cout; ++i) {
    const int64_t pixel = i / cout, o = i % cout;
    const int32_t dot = naive_dot(c, in, weight, pixel, o);
    float y = static_cast<float>(dot);
    if (e.clamp) y = std::min(std::max(y, e.lo), e.hi);
    if (e.scale) y *= e.scale[o];
    if (e.bias) y += e.bias[o];
    if (e.residual) y += static_cast<float>(residual.get(at(res, pixel, o % repeats)));
    if (e.shift_in) y += e.shift_in[o];
    if (e.slope && !(y > 0)) y *= e.slope[o];
    if (e.shift_out) y += e.shift_out[o];
    if (e.out_int) want.as<int32_t>()[at(out, pixel, o)] = dot;
    if (e.out && !e.out_int) want.set(at(out, pixel, o), y);
    if (e.sign_shift) y += e.sign_shift[o];
    bits[i] = e.t_lo ? dot >= lo[o] && dot <= hi[o] : !(y < 0);
  }
  if (e.out_int)
    check("packed_conv2d integers", got.size,
          [&](int64_t i) { return std::pair(got.bits(i), want.bits(i)); });
  else
    check_real("packed_conv2d", got, want);  // both untouched where only words are asked for
  if (e.words)
    check_words("packed_conv2d words", words, cout,
                [&](int64_t pixel, int64_t o) { return bits[pixel * cout + o]; });

  if (!e.out || e.out_int || !e.residual || repeats < cout || type != residual_type ||
      layout != residual_layout)
    return;
  Real both(type, extent);
  for (int64_t i = 0; i < pixels * cout; ++i)
    both.set(at(out, i / cout, i % cout), residual.get(at(res, i / cout, i % cout)));
  e.out = both.data();
  e.residual = both.data();
  packed_conv2d(k, c, e, out, res);
  check_real("packed_conv2d over its residual", both, want);
}

// Sums as large as they get, at both sides of what arranged filters take.
void test_longest(const Kernel& k, int64_t channels) {
  parameters = text(k.name, "channels", channels);
  const Words in = random_words(10, channels, 1), weight = random_words(17, channels, -1);
  const int64_t words = word_count(channels);
  Words tiles(2 * words * 16);
  tile_weight(weight.data.get(), 1, 17, words, tiles.data.get());
  Conv c = {1, 2, 5, 1, channels, 17, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2, 5, 0, nullptr, nullptr};
  c.input = in.data.get();
  c.tiles = tiles.data.get();
  std::vector<int32_t> out(10 * 17);
  Epilogue e;
  e.out = out.data();
  e.out_int = true;
  packed_conv2d(k, c, e, {170, 1, 85, 17}, {});
  check("packed_conv2d of the largest sums", 170,
        [&](int64_t i) { return std::pair(out[i], static_cast<int32_t>(-channels)); });
}

// Of one pixel, at both sides of what sums that are floats as they stand take.
void test_longest_float(const Kernel& k, int64_t channels) {
  parameters = text(k.name, "channels", channels);
  const Words in = random_words(1, channels, 1), weight = random_words(16, channels, -1);
  Words tiles(word_count(channels) * 16);
  tile_weight(weight.data.get(), 1, 16, word_count(channels), tiles.data.get());
  Conv c = {1, 1, 1, 1, channels, 16, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, nullptr, nullptr};
  c.input = in.data.get();
  c.tiles = tiles.data.get();
  std::vector<float> out(16);
  Epilogue e;
  e.out = out.data();
  packed_conv2d(k, c, e, {16, 1, 16, 16}, {});
  check("packed_conv2d of the largest sums as floats", 16,
        [&](int64_t i) { return std::pair(out[i], static_cast<float>(-channels)); });
}

void test_pool(int64_t n, int64_t height, int64_t width) {
  const auto any = [](int64_t most) { return range(1, most); };
  Pool p = {n,      height,      width,       any(4), any(4), any(4), any(3),
            any(3), range(0, 3), range(0, 3), any(3), any(3), 0,      0};
  p.out_h = out_size(height, 2 * p.pad_h, p.kh, p.stride_h, p.dilation_h);
  p.out_w = out_size(width, 2 * p.pad_w, p.kw, p.stride_w, p.dilation_w);
  parameters =
      text("image", n, height, width, p.words, "window", p.kh, p.kw, "stride", p.stride_h,
           p.stride_w, "padding", p.pad_h, p.pad_w, "dilation", p.dilation_h, p.dilation_w);
  const Words in = random_words(n * height * width, 32 * p.words);
  Words out(n * p.out_h * p.out_w * p.words);
  packed_max_pool2d(p, in.data.get(), out.data.get());
  check_words("packed_max_pool2d", out, 32 * p.words, [&](int64_t row, int64_t c) {
    bool most = false;
    for (int64_t tap = 0; tap < p.kh * p.kw; ++tap) {
      const int64_t y = row / p.out_w % p.out_h * p.stride_h - p.pad_h + tap / p.kw * p.dilation_h;
      const int64_t x = row % p.out_w * p.stride_w - p.pad_w + tap % p.kw * p.dilation_w;
      const int64_t pixel = (row / p.out_w / p.out_h * height + y) * width + x;
      if (y >= 0 && y < height && x >= 0 && x < width) most |= in.bit(pixel, p.words, c);
    }
    return most;
  });
}

void test_kernel(const Kernel& k) {
  rng.seed(20240229);
  for (const DType type : kTypes) {
    for (const int64_t channels : {1, 7, 31, 32, 33, 64, 100})
      for (const int64_t inner : {1, 2, 15, 16, 17, 70})
        for (const int64_t outer : {0, 1, 3}) {
          for (int i = 0; i < 4; ++i) test_bits(k, type, outer, channels, inner, i & 1, i & 2);
          for (int i = 0; i < 2; ++i) test_activations(k, type, outer, channels, inner, i);
        }
    for (int i = 0; i < 2; ++i) {  // rows and planes, enough of them for several tasks
      test_bits(k, type, i ? 1 : 1300, 40, i ? 2100 : 1, i, true);
      test_bits(k, type, i ? 1 : 1300, 64, i ? 2100 : 1, false, false);
      test_activations(k, type, i ? 1 : 1300, 40, i ? 2100 : 1, false);
    }
    test_activations(k, type, 70, 4101, 1, false);  // tasks that share channels
  }
  test_sums_of_many_rows(k);
  for (int i = 0; i < cases(1500); ++i) test_conv(k, random_conv());
  for (int i = 0; i < cases(400); ++i) test_conv(k, depthwise_conv());
  for (int i = 0; i < cases(300); ++i) test_conv(k, pointwise_conv(), true);
  for (int i = 0; i < 32; ++i) test_conv(k, kLarge[i % 4]);  // the others have one task
  for (int i = 0; i < 8; ++i)                                // pixels of more than one pass
    test_conv(k, {1, 60, 70, 1, 32, 32, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 60, 70, 0, {}, {}}, true);
  for (const int64_t channels : {32, 224, 256, 65504, 65536}) test_longest(k, channels);
  for (const int64_t more : {-32, -1, 0, 2, 32}) test_longest_float(k, kMostFloatSums + more);
  for (int i = 0; i < cases(200); ++i) test_pool(range(0, 2), range(1, 9), range(1, 9));
  test_pool(2, 70, 70);
  test_block_passes(k);
  test_gradients(k);
  test_real_layers(k);
  test_int8_layers(k);

  parameters = k.name;
  uint32_t sink = 1;
  const int64_t once = k.popcount_loop(1, &sink), more = k.popcount_loop(1000, &sink);
  check("popcount_loop", 1, [&](int64_t) { return std::pair(more, 1000 * once); });
}

}  // namespace
}  // namespace bitkernels

// Arguments: names of kernels, all where there are none; "others" are those besides scalar, of
// which a machine may have none. A number: of the random cases, one in so many.
int main(int count, char** arguments) {
  using namespace bitkernels;
  std::vector<std::string> names;
  for (int i = 1; i < count; ++i) {
    const int number = std::atoi(arguments[i]);
    if (number > 0)
      one_in = number;
    else
      names.emplace_back(arguments[i]);
  }
  const auto named = [&](const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  const bool others = named("others");
  const auto asked = [&](const Kernel& k) {
    return names.empty() || named(k.name) || (others && std::string(k.name) != "scalar");
  };
  for (int i = 0; i < kKernelCount; ++i) {
    if (!asked(*kKernels[i])) continue;
    const int64_t before = passed + failed;
    if (kKernels[i]->supported()) test_kernel(*kKernels[i]);
    std::cout << kKernels[i]->name << ": " << passed + failed - before << " checks"
              << (kKernels[i]->supported() ? "\n" : ", not supported by this machine\n");
  }
  std::cout << passed << " passed, " << failed << " failed\n";
  return failed != 0 || (passed == 0 && !others);
}
