// As packed_conv2d_weight_grad.cpp with the roles exchanged: the weights are bits, so that the sum
// over 4 output channels of gradient times weight is one of 16 values a pixel. Gradients are laid
// out as planes of padded rows, in which a filter tap is a fixed offset: one table of 32
// neighbouring pixels then serves every input channel, 8 loads and additions of 32 pixels for 1024
// products.
#include "packed_conv2d_input_grad.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace bitkernels {
namespace {

constexpr int64_t kPlaneBytes = 1 << 18;  // of the planes of one task

// (taps, ceil(out_channels / 32), channels padded to words): bit o of a word is output channel o.
std::vector<uint32_t> by_output(const Kernel& kernel, const Conv& conv, const uint32_t* weight,
                                int64_t words) {
  const int64_t taps = conv.kh * conv.kw, outs = ceil_div(conv.out_channels, 32);
  std::vector<uint32_t> bits(taps * outs * words * 32);
  const uint32_t zero = 0;
  parallel_for(taps * outs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t w = 0; w < words; ++w) {
        const uint32_t* rows[32];
        for (int64_t j = 0; j < 32; ++j) {
          const int64_t o = i % outs * 32 + j;
          rows[j] = o < conv.out_channels ? weight + (o * taps + i / outs) * words + w : &zero;
        }
        kernel.transpose_bits(rows, bits.data() + (i * words + w) * 32);
      }
  });
  return bits;
}

// Gradient planes of some rows of an image: a filter tap moves a pixel by a fixed offset, and the
// columns and rows past the border are 0.
struct Layout {
  int64_t reach, pitch, lead;  // rows that the filter spans past the first; elements before row 0
  explicit Layout(const Conv& conv) : reach((conv.kh - 1) * conv.dilation_h) {
    const int64_t across = (conv.kw - 1) * conv.dilation_w;
    lead = std::max<int64_t>(0, across - conv.left);
    pitch = conv.out_w + std::max(lead, std::max<int64_t>(0, across - conv.right));
  }
  int64_t plane(const Conv& conv, int64_t rows) const {
    return lead + (rows + reach) * pitch + conv.left + kPlanePixels;
  }
  int64_t offset(const Conv& conv, int64_t ky, int64_t kx) const {
    return lead + (reach - ky * conv.dilation_h) * pitch + conv.left - kx * conv.dilation_w;
  }
};

// Rows [y0, y1) of the result of image n.
void run_rows(const Kernel& kernel, const Conv& conv, const Layout& layout, const uint32_t* bits,
              int64_t words, const float* scale, const void* grad, DType type, int64_t n,
              int64_t y0, int64_t y1, void* out) {
  const int64_t plane = layout.plane(conv, y1 - y0), outs = ceil_div(conv.out_channels, 32);
  std::vector<float> planes(conv.out_channels * plane, 0.0f), acc(words * 32 * kPlanePixels);
  for (int64_t row = 0; row < y1 - y0 + layout.reach; ++row) {
    const int64_t y = y0 + conv.top - layout.reach + row;
    if (y < 0 || y >= conv.out_h) continue;
    const int64_t first = (n * conv.out_h + y) * conv.out_w * conv.out_channels;
    kernel.rows_to_planes(static_cast<const char*>(grad) + first * size_of(type), type, conv.out_w,
                          conv.out_channels, scale,
                          planes.data() + layout.lead + row * layout.pitch, plane);
  }
  PlaneSums s;
  s.plane = plane;
  s.channels = words * 32;
  s.acc = acc.data();
  const int64_t end = (y1 - y0) * layout.pitch;
  for (int64_t first = 0; first < end; first += kPlanePixels) {
    std::fill(acc.begin(), acc.end(), 0.0f);
    s.bits = bits;
    for (int64_t ky = 0; ky < conv.kh; ++ky)
      for (int64_t kx = 0; kx < conv.kw; ++kx)
        for (int64_t o = 0; o < outs; ++o, s.bits += s.channels) {
          s.planes = planes.data() + o * 32 * plane + first + layout.offset(conv, ky, kx);
          s.count = static_cast<int>(std::min<int64_t>(32, conv.out_channels - o * 32));
          kernel.plane_sums(s);
        }
    const int64_t last = std::min(end, first + kPlanePixels);
    for (int64_t q = first; q < last;) {  // the runs of pixels that are inside a row
      const int64_t x = q % layout.pitch, row_end = q - x + layout.pitch;
      if (x < conv.width) {
        const int64_t count = std::min(last - q, conv.width - x);
        const int64_t at =
            ((n * conv.height + y0 + q / layout.pitch) * conv.width + x) * conv.channels;
        kernel.planes_to_rows(acc.data() + q - first, kPlanePixels, count, conv.channels,
                              static_cast<char*>(out) + at * size_of(type), type);
      }
      q = row_end;
    }
  }
}

}  // namespace

void packed_conv2d_input_grad(const Kernel& kernel, const Conv& conv, const uint32_t* weight,
                              const float* scale, const void* grad, DType type, void* out) {
  const int64_t words = ceil_div(conv.channels, 32);
  const std::vector<uint32_t> bits = by_output(kernel, conv, weight, words);
  const Layout layout(conv);
  const int64_t row_bytes =
      std::max<int64_t>(1, conv.out_channels) * layout.pitch * static_cast<int64_t>(sizeof(float));
  const int64_t wanted = std::max<int64_t>(1, kPlaneBytes / row_bytes - layout.reach);
  const int64_t blocks = std::min(conv.height, ceil_div(conv.height, wanted));
  parallel_for(conv.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks;
      run_rows(kernel, conv, layout, bits.data(), words, scale, grad, type, i / blocks,
               conv.height * block / blocks, conv.height * (block + 1) / blocks, out);
    }
  });
}

}  // namespace bitkernels
