// Real convolution of float32 images, channels last, with weights arranged once. A linear layer is
// the 1x1 case on an image of one row. Fastest where input, weight and out begin at multiples of 64
// bytes. The number of threads does not change a bit of the result.
#pragma once
#include <cstdint>
#include <limits>

#include "kernels.h"

namespace bitkernels {

struct RealConv {
  int64_t batch, height, width;
  int64_t groups, channels, out_channels;  // channels and out_channels of one group
  int64_t kh, kw, stride_h, stride_w, top, left, dilation_h, dilation_w;
  int64_t out_h, out_w;         // padding below and to the right is what these leave
  const float* input;           // (batch, height, width, groups * channels)
  int64_t in_pixel;             // elements from one pixel to the next, at least groups * channels
  const float* weight;          // as arrange_conv2d wrote it
  const float* bias = nullptr;  // (groups * out_channels)
  float lo = -std::numeric_limits<float>::infinity(), hi = std::numeric_limits<float>::infinity();
  float* out;         // (batch, out_h, out_w, groups * out_channels), clamped to [lo, hi]
  int64_t out_pixel;  // as in_pixel
};

// Floats that the arranged weights of such a layer take; and arranging them, from (groups *
// out_channels, channels, kh, kw), dense. The arrangement depends on the kernel.
int64_t arranged_conv2d_size(const Kernel& kernel, const RealConv& layer);
void arrange_conv2d(const Kernel& kernel, const RealConv& layer, const float* weight, float* out);

void conv2d(const Kernel& kernel, const RealConv& conv);

}  // namespace bitkernels
