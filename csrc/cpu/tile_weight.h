// Filters in the order in which the convolution reads them.
#pragma once
#include "kernels.h"

namespace bitkernels {

// (groups * out_channels, taps) words to tiles, taps = kh * kw * words.
void tile_weight(const uint32_t* weight, int64_t groups, int64_t out_channels, int64_t taps,
                 uint32_t* tiles);

}  // namespace bitkernels
