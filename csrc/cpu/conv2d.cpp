#include "conv2d.h"

#include <algorithm>

#include "parallel.h"

namespace bitkernels {

int64_t arranged_conv2d_size(const Kernel&, const RealConv& c) {
  return c.groups * c.out_channels * c.channels * c.kh * c.kw;
}

// (groups, taps, channels, out_channels)
void arrange_conv2d(const Kernel&, const RealConv& c, const float* weight, float* out) {
  const int64_t taps = c.kh * c.kw;
  for (int64_t g = 0; g < c.groups; ++g)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < c.channels; ++i)
        for (int64_t o = 0; o < c.out_channels; ++o)
          *out++ = weight[((g * c.out_channels + o) * c.channels + i) * taps + tap];
}

void conv2d(const Kernel&, const RealConv& c) {
  const int64_t rows = c.batch * c.out_h, cout = c.out_channels;
  const int64_t work = c.out_w * c.groups * cout * c.channels * c.kh * c.kw;
  parallel_for(rows, 1 + (1 << 18) / std::max<int64_t>(work, 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * c.out_w; i < end * c.out_w; ++i)
      for (int64_t g = 0; g < c.groups; ++g) {
        const int64_t n = i / c.out_w / c.out_h;
        float* out = c.out + i * c.out_pixel + g * cout;
        for (int64_t o = 0; o < cout; ++o) out[o] = c.bias ? c.bias[g * cout + o] : 0;
        for (int64_t tap = 0; tap < c.kh * c.kw; ++tap) {
          const int64_t y = i / c.out_w % c.out_h * c.stride_h - c.top + tap / c.kw * c.dilation_h;
          const int64_t x = i % c.out_w * c.stride_w - c.left + tap % c.kw * c.dilation_w;
          if (y < 0 || y >= c.height || x < 0 || x >= c.width) continue;
          const float* in =
              c.input + ((n * c.height + y) * c.width + x) * c.in_pixel + g * c.channels;
          const float* w = c.weight + (g * c.kh * c.kw + tap) * c.channels * cout;
          for (int64_t j = 0; j < c.channels; ++j, w += cout)
            for (int64_t o = 0; o < cout; ++o) out[o] += in[j] * w[o];
        }
        for (int64_t o = 0; o < cout; ++o)  // NaN stays
          out[o] = out[o] < c.lo ? c.lo : out[o] > c.hi ? c.hi : out[o];
      }
  });
}

}  // namespace bitkernels
