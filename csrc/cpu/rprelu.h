// RPReLU on tensors seen as (outer, channels, inner). Per-channel parameters are float, or double
// for kF64, and readable 16 past the last channel.
#pragma once
#include "kernels.h"

namespace bitkernels {

void rprelu(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
            int64_t inner, const void* shift_in, const void* slope, const void* shift_out,
            void* out);

// sums: 3 x channels (shift_in, slope, shift_out), the same for every number of threads.
void rprelu_backward(const Kernel& kernel, const void* grad, const void* x, DType type,
                     int64_t outer, int64_t channels, int64_t inner, const void* shift_in,
                     const void* slope, void* grad_x, float* sums);

}  // namespace bitkernels
