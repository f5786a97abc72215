// Elementwise work on (outer, channels, inner) cut into tasks, for activations and block passes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace bitkernels {

constexpr int64_t kElements = 1 << 14;  // of one task, or of one step of it
constexpr int64_t kMostRowTasks = 256;

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

// A tensor's tasks, of the same size whatever the number of threads, so that sums are too: runs of
// rows of channels where inner is 1, else planes of one channel. Rows are handed out in steps. With
// sums over them a step is what is summed in the arithmetic's own type, and there are few tasks,
// since each has sums of its own.
struct Tasks {
  int64_t outer, channels, inner;
  bool sums = false;
  bool rows() const { return inner == 1; }
  int64_t step() const { return std::max<int64_t>(sums ? 16 : 1, kElements / channels); }
  int64_t rows_each() const {
    if (!sums) return step();
    const int64_t steps = (outer + step() - 1) / step();
    return step() * std::max<int64_t>(1, (steps + kMostRowTasks - 1) / kMostRowTasks);
  }
  int64_t count() const {
    return rows() ? (outer + rows_each() - 1) / rows_each() : outer * channels;
  }
  int64_t width() const { return rows() ? channels : 1; }  // channels of a task

  // f(task, first element, elements, channel), channel -1 for rows: once for each step of a task.
  template <class F>
  void run(const F& f) const {
    if (rows()) {
      parallel_for(count(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t end_row = std::min((t + 1) * rows_each(), outer);
          for (int64_t row = t * rows_each(); row < end_row; row += step())
            f(t, row * channels, std::min(step(), end_row - row) * channels, int64_t{-1});
        }
      });
      return;
    }
    parallel_for(count(), 1 + kElements / std::max<int64_t>(inner, 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) f(t, t * inner, inner, t % channels);
                 });
  }

  // partial: (count, kinds, width), in the order of the tasks; total: (kinds, channels).
  void add_up(const std::vector<double>& partial, int64_t kinds, double* total) const {
    std::fill(total, total + kinds * channels, 0.0);
    const int64_t each = rows() ? count() : outer;  // numbers in a sum
    parallel_for(
        channels, 1 + kElements / std::max<int64_t>(each, 1), [&](int64_t begin, int64_t end) {
          for (int64_t t = 0; t < each; ++t)
            for (int64_t k = 0; k < kinds; ++k)
              for (int64_t c = begin; c < end; ++c)
                total[k * channels + c] += partial[rows() ? (t * kinds + k) * channels + c
                                                          : (t * channels + c) * kinds + k];
        });
  }
};

}  // namespace bitkernels
