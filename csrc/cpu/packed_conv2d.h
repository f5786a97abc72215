// Binary convolution on packed NHWC words. A linear layer is the 1x1 case on an image of one row.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitkernels {

struct Conv {
  int64_t batch, height, width;
  int64_t groups, channels, out_channels;  // channels and out_channels of one group
  int64_t kh, kw, stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w;
  int64_t out_h, out_w;
  int pad_value;          // -1, 0 or 1
  const uint32_t* input;  // (batch, height, width, ceil(groups * channels / 32))
  const uint32_t* tiles;  // (groups * ceil(out_channels / 16), kh, kw, ceil(channels / 32), 16)
};

// Element strides of a tensor (batch, channel, row, column).
struct Strides {
  int64_t n, c, h, w;
};

// Words are written as (batch, out_h, out_w, ceil(groups * out_channels / 32)).
void packed_conv2d(const Kernel& kernel, Conv conv, Epilogue epilogue, Strides out,
                   Strides residual);

}  // namespace bitkernels
