// Gradient of a convolution of stride 1 with respect to its input, from the packed signs of its
// weight and the real gradient of its output.
#pragma once
#include "kernels.h"
#include "packed_conv2d.h"

namespace bitkernels {

// conv: one group, stride 1; its input and tiles are not read. weight: (out_channels, kh, kw,
// words) packed signs. scale: a factor per output channel, or null. grad: (batch, out_h, out_w,
// out_channels); out: (batch, height, width, channels); both dense and of `type`, not kF64.
void packed_conv2d_input_grad(const Kernel& kernel, const Conv& conv, const uint32_t* weight,
                              const float* scale, const void* grad, DType type, void* out);

}  // namespace bitkernels
