#include "packed_min_pool2d.h"

#include <algorithm>

#include "parallel.h"

namespace bitkernels {

void packed_min_pool2d(const Pool& pool, const uint32_t* in, uint32_t* out) {
  const int64_t row_work = std::max<int64_t>(1, pool.out_w * pool.words * pool.kh * pool.kw);
  parallel_for(pool.batch * pool.out_h, 1 + (1 << 15) / row_work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / pool.out_h, oy = i % pool.out_h;
      for (int64_t ox = 0; ox < pool.out_w; ++ox) {
        uint32_t* to = out + (i * pool.out_w + ox) * pool.words;
        std::fill(to, to + pool.words, ~0u);
        for (int64_t tap = 0; tap < pool.kh * pool.kw; ++tap) {
          const int64_t y = oy * pool.stride_h + tap / pool.kw;
          const int64_t x = ox * pool.stride_w + tap % pool.kw;
          const uint32_t* from = in + ((n * pool.height + y) * pool.width + x) * pool.words;
          for (int64_t j = 0; j < pool.words; ++j) to[j] &= from[j];
        }
      }
    }
  });
}

}  // namespace bitkernels
