// RSign on tensors seen as (outer, channels, inner). The shift is (samples, channels), float, or
// double for kF64, and readable 16 past the last channel: each sample's outer / samples rows have
// one of their own.
#pragma once
#include "kernels.h"

namespace bitkernels {

void rsign(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
           int64_t inner, const void* shift, int64_t samples, void* out);

}  // namespace bitkernels
