// The number of threads, by whoever provides cpu/parallel.h.
#pragma once

namespace bitkernels::network {

// Null, or why the number cannot be set.
const char* set_threads(int count);

}  // namespace bitkernels::network
