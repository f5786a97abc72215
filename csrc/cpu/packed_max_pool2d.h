// Maximum of signs over windows of packed NHWC words: the or of their bits.
#pragma once
#include <cstdint>

namespace bitkernels {

struct Pool {
  int64_t batch, height, width, words;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
};

void packed_max_pool2d(const Pool& pool, const uint32_t* in, uint32_t* out);

}  // namespace bitkernels
