// The passes of a residual binary block around its convolution, on channels-last rows, and the
// backward of sign. Vectors are float, or double for kF64, and readable 32 past the last channel.
#pragma once
#include "kernels.h"

namespace bitkernels {

void block_forward(const Kernel& kernel, const BlockRows& rows);

// sums: 4 x channels, the same for every number of threads.
void block_backward(const Kernel& kernel, const BlockRows& rows, double* sums);

void norm_backward(const Kernel& kernel, const BlockRows& rows);

// Over tensors seen as (outer, channels, inner); `rows` holds everything but n, repeat and sum, its
// shift per channel. sum: channels, of the first term, the same for every number of threads.
void sign_backward(const Kernel& kernel, const SignBackward& rows, int64_t outer, int64_t channels,
                   int64_t inner, double* sum);

}  // namespace bitkernels
