// Elementwise work between words and real tensors seen as (outer, channels, inner).
#pragma once
#include <algorithm>

#include "tasks.h"

namespace bitkernels {

constexpr int64_t kElementsEach = 1 << 15;  // per task, about 10 us of one core
constexpr int64_t kPixels = 1 << 10;        // planes are cut into blocks of pixels

inline int64_t rows_per_task(int64_t channels) {
  return std::max<int64_t>(1, kElementsEach / std::max<int64_t>(channels, 1));
}

// f(element offset of the first channel's first pixel, pixels, channels, word offset, outer index,
// first channel)
template <class F>
void for_planes(int64_t outer, int64_t channels, int64_t inner, const F& f) {
  const int64_t words = (channels + 31) / 32, blocks = (inner + kPixels - 1) / kPixels;
  const int64_t grain = 1 + kElementsEach / (32 * std::max<int64_t>(1, std::min(kPixels, inner)));
  parallel_for(outer * words * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % blocks * kPixels, j = i / blocks % words, n = i / blocks / words;
      const int64_t c = 32 * j;
      f((n * channels + c) * inner + p, std::min(kPixels, inner - p),
        static_cast<int>(std::min<int64_t>(32, channels - c)), (n * inner + p) * words + j, n, c);
    }
  });
}

}  // namespace bitkernels
