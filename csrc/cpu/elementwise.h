// Elementwise work on rows of channels in float32: what stands between a network's products.
#pragma once
#include <cstdint>
#include <limits>

#include "kernels.h"

namespace bitkernels {

// Rows of `channels` elements, `*_row` elements apart. Vectors are per channel, readable 32 past
// the end, null where absent. out may be x or y.
struct RowsJob {
  int64_t rows, channels;
  const float* x;
  int64_t x_row;
  const float* y = nullptr;  // a second operand, by its rows
  int64_t y_row = 0;         // 0: one row for all
  float* out;
  int64_t out_row;
  const float *scale = nullptr, *shift = nullptr, *slope = nullptr;
  float lo = -std::numeric_limits<float>::infinity(), hi = std::numeric_limits<float>::infinity();
};

// out = clamp(act(x * scale + shift + y), lo, hi), act(v) = v < 0 or NaN ? v * slope : v where
// slope is given; each rounded, no fused multiply-add: as batch norm in evaluation, addition,
// PReLU, ReLU.
void affine_rows(const Kernel& kernel, const RowsJob& job);
// out = x * y.
void multiply_rows(const Kernel& kernel, const RowsJob& job);
// out = 1 / (1 + exp(-x)), within 2 ulp.
void sigmoid_rows(const Kernel& kernel, const RowsJob& job);
// Images (channels, pixels) to rows (pixels, channels) and back; strides in elements.
void planes_to_rows(const float* planes, int64_t plane, int64_t channels, int64_t pixels,
                    float* rows, int64_t row);
void rows_to_planes(const float* rows, int64_t row, int64_t channels, int64_t pixels, float* planes,
                    int64_t plane);

}  // namespace bitkernels
