// The passes of a residual binary block around its convolution, on channels-last rows. Vectors are
// float, or double for kF64, and readable 32 past the last channel.
#pragma once
#include "kernels.h"

namespace bitkernels {

void block_forward(const Kernel& kernel, const BlockRows& rows);

// sums: 4 x channels, the same for every number of threads.
void block_backward(const Kernel& kernel, const BlockRows& rows, double* sums);

void norm_backward(const Kernel& kernel, const BlockRows& rows);

}  // namespace bitkernels
