#include "tile_weight.h"

#include <algorithm>

#include "parallel.h"

namespace bitkernels {

void tile_weight(const uint32_t* weight, int64_t groups, int64_t out_channels, int64_t taps,
                 uint32_t* tiles) {
  const int64_t per_group = ceil_div(out_channels, kTile);
  parallel_for(groups * per_group, 1 + (1 << 16) / (kTile * taps + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const int64_t g = t / per_group, first = t % per_group * kTile;
                   uint32_t* tile = tiles + t * taps * kTile;
                   const int64_t lanes = std::min<int64_t>(kTile, out_channels - first);
                   const uint32_t* from = weight + (g * out_channels + first) * taps;
                   for (int64_t k = 0; k < taps; ++k) {
                     for (int64_t lane = 0; lane < lanes; ++lane)
                       tile[k * kTile + lane] = from[lane * taps + k];
                     for (int64_t lane = lanes; lane < kTile; ++lane) tile[k * kTile + lane] = 0;
                   }
                 }
               });
}

}  // namespace bitkernels
