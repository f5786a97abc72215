#include "pool2d.h"

#include <algorithm>
#include <limits>

#include "parallel.h"

namespace bitkernels {
namespace {

// f(first pixel of the image, output row, output column, output channels)
template <class F>
void for_windows(const RealPool& p, const F& f) {
  const int64_t rows = p.batch * p.out_h, work = p.out_w * p.channels * p.kh * p.kw;
  parallel_for(rows, 1 + (1 << 15) / std::max<int64_t>(work, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t x = 0; x < p.out_w; ++x)
        f(p.input + i / p.out_h * p.height * p.width * p.in_pixel, i % p.out_h, x,
          p.out + (i * p.out_w + x) * p.out_pixel);
  });
}

// Sum of [y0, y1) x [x0, x1) over the divisor.
void mean(const RealPool& p, const float* in, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
          float divisor, float* out) {
  std::fill(out, out + p.channels, 0.0f);
  if (y0 >= y1 || x0 >= x1) return;
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = x0; x < x1; ++x) {
      const float* from = in + (y * p.width + x) * p.in_pixel;
      for (int64_t c = 0; c < p.channels; ++c) out[c] += from[c];
    }
  for (int64_t c = 0; c < p.channels; ++c) out[c] /= divisor;
}

}  // namespace

void max_pool2d(const Kernel&, const RealPool& p) {
  for_windows(p, [&](const float* in, int64_t oy, int64_t ox, float* out) {
    std::fill(out, out + p.channels, -std::numeric_limits<float>::infinity());
    for (int64_t tap = 0; tap < p.kh * p.kw; ++tap) {
      const int64_t y = oy * p.stride_h - p.top + tap / p.kw * p.dilation_h;
      const int64_t x = ox * p.stride_w - p.left + tap % p.kw * p.dilation_w;
      if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
      const float* from = in + (y * p.width + x) * p.in_pixel;
      for (int64_t c = 0; c < p.channels; ++c)
        if (!(from[c] <= out[c])) out[c] = out[c] != out[c] ? out[c] : from[c];
    }
  });
}

void avg_pool2d(const Kernel&, const RealPool& p, bool count_padding, int64_t divisor) {
  for_windows(p, [&](const float* in, int64_t oy, int64_t ox, float* out) {
    const int64_t y0 = oy * p.stride_h - p.top, x0 = ox * p.stride_w - p.left;
    const int64_t y1 = std::min(y0 + p.kh, p.height + p.bottom);
    const int64_t x1 = std::min(x0 + p.kw, p.width + p.right);
    const int64_t top = std::max<int64_t>(y0, 0), bottom = std::min(y1, p.height);
    const int64_t left = std::max<int64_t>(x0, 0), right = std::min(x1, p.width);
    const int64_t count = count_padding ? (y1 - y0) * (x1 - x0) : (bottom - top) * (right - left);
    mean(p, in, top, bottom, left, right, static_cast<float>(divisor ? divisor : count), out);
  });
}

void adaptive_avg_pool2d(const Kernel&, const RealPool& p) {
  for_windows(p, [&](const float* in, int64_t oy, int64_t ox, float* out) {
    const int64_t y0 = oy * p.height / p.out_h, y1 = ceil_div((oy + 1) * p.height, p.out_h);
    const int64_t x0 = ox * p.width / p.out_w, x1 = ceil_div((ox + 1) * p.width, p.out_w);
    mean(p, in, y0, y1, x0, x1, static_cast<float>((y1 - y0) * (x1 - x0)), out);
  });
}

}  // namespace bitkernels
