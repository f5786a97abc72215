// Pooling of real float32 images, channels last.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace bitkernels {

struct RealPool {
  int64_t batch, height, width, channels;
  int64_t kh, kw, stride_h, stride_w, top, bottom, left, right, dilation_h = 1, dilation_w = 1;
  int64_t out_h, out_w;
  const float* input;
  int64_t in_pixel;  // elements from one pixel to the next
  float* out;
  int64_t out_pixel;
};

// As torch.nn.functional: windows may reach past the padding (ceil_mode); NaN wins.
void max_pool2d(const Kernel& kernel, const RealPool& pool);
// count_padding: count_include_pad; divisor: divisor_override, 0 for none.
void avg_pool2d(const Kernel& kernel, const RealPool& pool, bool count_padding, int64_t divisor);
// Only the sizes, pointers and pixels of `pool` are read; out 1x1 is the global average.
void adaptive_avg_pool2d(const Kernel& kernel, const RealPool& pool);

}  // namespace bitkernels
