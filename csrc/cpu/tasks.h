// Elementwise work on (outer, channels, inner) cut into tasks, for activations and block passes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace bitkernels {

constexpr int64_t kElements = 1 << 14;  // of one task, or of one step of it

inline const void* at(const void* p, DType type, int64_t element) {
  return p ? static_cast<const char*>(p) + element * size_of(type) : nullptr;
}
inline void* at(void* p, DType type, int64_t element) {
  return p ? static_cast<char*>(p) + element * size_of(type) : nullptr;
}

// 16 copies of one channel's parameter, in its own type.
struct Repeated {
  alignas(64) double d[16];
  alignas(64) float f[16];
  const void* of(const void* vector, DType type, int64_t c) {
    if (type == DType::kF64) {
      std::fill(d, d + 16, static_cast<const double*>(vector)[c]);
      return d;
    }
    std::fill(f, f + 16, static_cast<const float*>(vector)[c]);
    return f;
  }
};

// A tensor's tasks: steps of rows of channels where inner is 1, else planes of one channel.
struct Tasks {
  int64_t outer, channels, inner;
  int64_t step() const { return std::max<int64_t>(1, kElements / channels); }

  // f(first element, elements, channel), channel -1 for rows.
  template <class F>
  void run(const F& f) const {
    if (inner == 1) {
      parallel_for(ceil_div(outer, step()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * step(); row < std::min(end * step(), outer); row += step())
          f(row * channels, std::min(step(), outer - row) * channels, int64_t{-1});
      });
      return;
    }
    parallel_for(outer * channels, 1 + kElements / std::max<int64_t>(inner, 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) f(t * inner, inner, t % channels);
                 });
  }
};

}  // namespace bitkernels
