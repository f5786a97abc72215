// How the output of a real layer, float32 or int8, is cut into tasks for threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "conv2d.h"
#include "parallel.h"
#include "segments.h"

namespace bitkernels {

constexpr int64_t kBlockBytes = 256 << 10;  // of input, which stay in the second-level cache

// run(image, group, first of `chunk` output channels, rectangle of pixels), over blocks of rows; of
// columns in a one-row image. Input elements have 4 bytes. cost: of a product; least: of a task.
template <class F>
void for_tasks(const RealConv& c, int64_t chunk, int64_t cost, double least, const F& run) {
  const bool by_rows = c.out_h > 1;
  const int threads = parallel_threads();
  const int64_t lines = by_rows ? c.out_h : c.out_w;
  const int64_t chunks = ceil_div(c.out_channels, chunk);
  const int64_t outer = c.batch * c.groups;
  const int64_t bytes = c.height * c.width * c.in_pixel * 4;
  const int64_t wanted = threads == 1 ? 1 : ceil_div(4 * threads, outer * chunks);
  const int64_t blocks = std::min(std::max(wanted, ceil_div(bytes, kBlockBytes)),
                                  by_rows ? lines : ceil_div(lines, 28));
  // A weight that comes from memory costs as much as 5 products.
  const double weights =
      static_cast<double>(c.kh) * c.kw * c.channels * std::min(chunk, c.out_channels);
  const double products = weights * (static_cast<double>(c.out_h) * c.out_w * cost / blocks + 5);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(least / (products + 1)));
  parallel_for(outer * blocks * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / chunks % blocks, image = i / chunks / blocks;
      Box box = {0, c.out_h, 0, c.out_w};
      int64_t& lo = by_rows ? box.y0 : box.x0;
      int64_t& hi = by_rows ? box.y1 : box.x1;
      lo = lines * block / blocks;
      hi = lines * (block + 1) / blocks;
      run(image / c.groups, image % c.groups, i % chunks * chunk, box);
    }
  });
}

}  // namespace bitkernels
