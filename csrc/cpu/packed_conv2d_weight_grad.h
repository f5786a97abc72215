// Gradient of a convolution with respect to the signs of its weight, from the packed signs of its
// input and the real gradient of its output.
#pragma once
#include "kernels.h"
#include "packed_conv2d.h"

namespace bitkernels {

// conv: one group; its tiles are not read. grad: (batch, out_h, out_w, out_channels) dense. out:
// (out_channels, kh, kw, channels) float. The same for every number of threads.
void packed_conv2d_weight_grad(const Kernel& kernel, const Conv& conv, const void* grad, DType type,
                               float* out);

}  // namespace bitkernels
