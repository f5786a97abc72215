// Gradients through packed masks, on tensors seen as (outer, channels, inner); words are (outer,
// inner, words).
#pragma once
#include "kernels.h"

namespace bitkernels {

// out = grad where the mask bit is set, else 0; same layout as grad.
void mask_grad(const Kernel& kernel, const void* grad, DType type, int64_t outer, int64_t channels,
               int64_t inner, const uint32_t* mask, void* out);

}  // namespace bitkernels
