// Words, (rows, words), to real values.
#pragma once
#include "kernels.h"

namespace bitkernels {

// +-1 with the channels innermost.
void unpack(const Kernel& kernel, const uint32_t* words, DType type, int64_t rows, int64_t channels,
            void* out);

}  // namespace bitkernels
