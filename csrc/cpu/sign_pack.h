// Signs of real tensors seen as (outer, channels, inner); words are (outer, inner, words).
#pragma once
#include "kernels.h"

namespace bitkernels {

// `shift` (samples, channels) in the wide type, readable 32 past its end, or null: each sample's
// outer / samples rows have one of their own. `mask` (bits |x + shift| <= clip) may be null.
void sign_pack(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
               int64_t inner, const void* shift, int64_t samples, double clip, uint32_t* signs,
               uint32_t* mask);

}  // namespace bitkernels
