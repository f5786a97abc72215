// The gradient of sign(x + shift) on tensors seen as (outer, channels, inner). The shift is float,
// or double for kF64, and readable 32 past the last channel.
#pragma once
#include "kernels.h"

namespace bitkernels {

// `rows` holds everything but n, repeat and sum, its shift per channel. sum: channels, of the first
// term, the same for every number of threads.
void sign_backward(const Kernel& kernel, const SignBackward& rows, int64_t outer, int64_t channels,
                   int64_t inner, double* sum);

}  // namespace bitkernels
