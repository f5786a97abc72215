// The input's signs x are bits, so that the sum of g x over 6 output pixels is one of 64 values:
// with the table of all subset sums T, sum g x = 2 T[pixels where x is +1] - sum g. The tables of a
// chunk of 36 pixels and 16 output channels fit the first-level cache; every weight (input channel
// and tap) then costs 6 loads and additions of 16 channels for 576 products. Entries that stand for
// "this tap is inside the image" give sum g, with zero padding at the border left out.
#include "packed_conv2d_weight_grad.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

namespace bitkernels {
namespace {

constexpr int64_t kOffsets = 1 << 18;  // in one block of pixels, 512 KiB
constexpr int64_t kWantedTasks = 32;

struct Shape {
  const Conv& conv;
  int64_t words, taps, entries, pixels;  // entries: taps x 32 words, then the taps
  explicit Shape(const Conv& c)
      : conv(c),
        words(ceil_div(c.channels, 32)),
        taps(c.kh * c.kw),
        entries(taps * words * 32 + 32 * ceil_div(taps, 32)),
        pixels(c.batch * c.out_h * c.out_w) {}
};

// The offsets of one table's pixels, `count` of them from `first` on.
void offsets_of(const Kernel& kernel, const Shape& shape, int64_t first, int64_t count,
                const uint32_t* zeros, const uint32_t* ones, uint16_t* offsets) {
  const Conv& conv = shape.conv;
  const uint32_t* outside = conv.pad_value == 1 ? ones : zeros;
  int64_t image[kSubset], top[kSubset], left[kSubset];  // of each pixel's window
  for (int j = 0; j < kSubset && j < count; ++j) {
    const int64_t pixel = first + j, row = pixel / conv.out_w;
    image[j] = row / conv.out_h * conv.height * conv.width;
    top[j] = row % conv.out_h * conv.stride_h - conv.top;
    left[j] = pixel % conv.out_w * conv.stride_w - conv.left;
  }
  const uint32_t* rows[kSubset];
  const int64_t inside_words = ceil_div(shape.taps, 32);
  std::vector<uint32_t> inside(kSubset * inside_words, 0);
  for (int64_t ky = 0, tap = 0; ky < conv.kh; ++ky)
    for (int64_t kx = 0; kx < conv.kw; ++kx, ++tap) {
      for (int j = 0; j < kSubset; ++j) {
        rows[j] = zeros;
        if (j >= count) continue;
        const int64_t y = top[j] + ky * conv.dilation_h, x = left[j] + kx * conv.dilation_w;
        const bool in = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
        rows[j] = in ? conv.input + (image[j] + y * conv.width + x) * shape.words : outside;
        if (in || conv.pad_value != 0) inside[j * inside_words + tap / 32] |= 1u << tap % 32;
      }
      kernel.subset_offsets(rows, shape.words, offsets + tap * shape.words * 32);
    }
  for (int j = 0; j < kSubset; ++j) rows[j] = inside.data() + j * inside_words;
  kernel.subset_offsets(rows, inside_words, offsets + shape.taps * shape.words * 32);
}

// 16 output channels of the result from their sums.
void write(const Shape& shape, const float* acc, int64_t channel, float* out) {
  const Conv& conv = shape.conv;
  const int64_t lanes = std::min<int64_t>(16, conv.out_channels - channel);
  const float* sums = acc + shape.taps * shape.words * 32 * 16;
  for (int64_t tap = 0; tap < shape.taps; ++tap)
    for (int64_t c = 0; c < conv.channels; c += 16)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float* from = acc + (tap * shape.words * 32 + c) * 16 + lane;
        float* to = out + ((channel + lane) * shape.taps + tap) * conv.channels + c;
        const float all = sums[tap * 16 + lane];
        for (int64_t i = 0; i < std::min<int64_t>(16, conv.channels - c); ++i)
          to[i] = 2 * from[i * 16] - all;
      }
}

}  // namespace

void packed_conv2d_weight_grad(const Kernel& kernel, const Conv& conv, const void* grad, DType type,
                               float* out) {
  const Shape shape(conv);
  const int64_t groups = ceil_div(conv.out_channels, 16);
  const int64_t chunks = ceil_div(shape.pixels, kTablePixels);
  const int64_t splits = std::max<int64_t>(1, std::min(chunks, ceil_div(kWantedTasks, groups)));
  const int64_t per_block =
      std::max<int64_t>(splits, kOffsets / (kTables * shape.entries));  // chunks
  const int64_t size = shape.entries * 16;
  std::vector<float> sums(groups * splits * size, 0.0f);
  const std::unique_ptr<uint16_t[]> offsets(
      new uint16_t[std::min(per_block, chunks) * kTables * shape.entries]);
  const std::vector<uint32_t> zeros(shape.words, 0), ones(shape.words, ~0u);

  for (int64_t block = 0; block < chunks; block += per_block) {
    const int64_t count = std::min(per_block, chunks - block);
    parallel_for(count * kTables, 1 + (1 << 14) / shape.entries, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = block * kTablePixels + t * kSubset;
        offsets_of(kernel, shape, first, shape.pixels - first, zeros.data(), ones.data(),
                   offsets.get() + t * shape.entries);
      }
    });
    parallel_for(groups * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / splits, split = task % splits;
        TableSums s;
        s.type = type;
        s.stride = conv.out_channels;
        s.channels = static_cast<int>(std::min<int64_t>(16, conv.out_channels - group * 16));
        s.entries = shape.entries;
        s.acc = sums.data() + task * size;
        for (int64_t c = count * split / splits; c < count * (split + 1) / splits; ++c) {
          const int64_t first = (block + c) * kTablePixels;
          s.pixels = static_cast<int>(std::min<int64_t>(kTablePixels, shape.pixels - first));
          s.grad = static_cast<const char*>(grad) +
                   (first * conv.out_channels + group * 16) * size_of(type);
          s.offsets = offsets.get() + c * kTables * shape.entries;
          kernel.table_sums(s);
        }
      }
    });
  }
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      float* total = sums.data() + group * splits * size;
      for (int64_t split = 1; split < splits; ++split)
        for (int64_t i = 0; i < size; ++i) total[i] += total[split * size + i];
      write(shape, total, group * 16, out);
    }
  });
}

}  // namespace bitkernels
