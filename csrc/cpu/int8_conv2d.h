// Convolution of float32 images with int8 filters: the image is rounded to multiples of 1 / steps,
// the products are summed exactly. As conv2d.h in all else.
#pragma once
#include "conv2d.h"

namespace bitkernels {

struct Int8Conv {
  RealConv layer;         // all but its weight
  float steps;            // an activation is round(x * steps), to even at halves, in [-127, 127]
  const int32_t* weight;  // as arrange_int8_conv2d wrote it
  const float* scale;     // (groups * out_channels): float(sum) * scale + bias, two roundings
  int32_t* quantized;     // memory for int8_input_size words
};

// The most products of a sum that int32 holds, whatever they are.
constexpr int64_t kMostInt8Products = ((int64_t{1} << 31) - 1) / (127 * 128);

// The best way that this machine has.
const Int8Dot& int8_dot(const Kernel& kernel);

int64_t int8_input_size(const Int8Dot& dot, const RealConv& layer);
// 32-bit words of the arranged weights; and arranging them, from (groups * out_channels, channels,
// kh, kw), dense.
int64_t arranged_int8_size(const Int8Dot& dot, const RealConv& layer);
void arrange_int8_conv2d(const Int8Dot& dot, const RealConv& layer, const int8_t* weight,
                         int32_t* out);

void int8_conv2d(const Int8Dot& dot, const Int8Conv& conv);

}  // namespace bitkernels
