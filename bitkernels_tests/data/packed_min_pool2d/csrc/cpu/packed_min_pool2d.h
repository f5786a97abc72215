// Minimum of signs over windows of packed NHWC words: the and of their bits.
#pragma once
#include "packed_max_pool2d.h"

namespace bitkernels {

// Every window lies inside the image.
void packed_min_pool2d(const Pool& pool, const uint32_t* in, uint32_t* out);

}  // namespace bitkernels
