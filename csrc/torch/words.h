// Packing and tiling of tensors, for every operator that starts with it.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bitkernels {

// Signs of `input` along `dim` and, with clip, the mask; checks what it is given, in the name of
// `op`.
std::tuple<Tensor, OptTensor> pack(const char* op, const Tensor& input, OptFloat clip,
                                   const OptTensor& shift, int64_t dim);

// Filters, (out_channels, taps, words), in tiles.
Tensor tiled(const Tensor& weight_words, int64_t out_channels, int64_t groups);

}  // namespace bitkernels
