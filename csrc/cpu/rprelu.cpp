#include "rprelu.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace bitkernels {
namespace {

constexpr int64_t kElements = 1 << 14;  // of one task

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

// Tasks of the same size whatever the number of threads, each a run of elements: f(task, element,
// count, channel), channel -1 for whole rows of channels.
template <class F>
void for_tasks(int64_t outer, int64_t channels, int64_t inner, const F& f) {
  if (inner == 1) {
    const int64_t rows = std::max<int64_t>(1, kElements / channels);
    const int64_t tasks = (outer + rows - 1) / rows;
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        f(t, t * rows * channels, std::min(rows, outer - t * rows) * channels, int64_t{-1});
    });
    return;
  }
  const int64_t planes = outer * channels;
  parallel_for(planes, 1 + kElements / std::max<int64_t>(inner, 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) f(t, t * inner, inner, t % channels);
               });
}

const void* at(const void* p, DType type, int64_t element) {
  return static_cast<const char*>(p) + element * size_of(type);
}
void* at(void* p, DType type, int64_t element) {
  return static_cast<char*>(p) + element * size_of(type);
}

template <class W>
void backward_of(const Kernel& kernel, const void* grad, const void* x, DType type, int64_t outer,
                 int64_t channels, int64_t inner, const void* shift_in, const void* slope,
                 void* grad_x, float* sums) {
  const bool rows = inner == 1;
  const int64_t row_tasks = std::max<int64_t>(1, kElements / channels);
  const int64_t tasks = rows ? (outer + row_tasks - 1) / row_tasks : outer * channels;
  const int64_t width = rows ? channels : 1;
  std::vector<double> partial(tasks * 3 * width, 0.0);
  for_tasks(outer, channels, inner, [&](int64_t t, int64_t first, int64_t count, int64_t c) {
    double* to = partial.data() + t * 3 * width;
    if (c < 0) {
      std::vector<W> acc(3 * channels, W(0));
      for (int64_t i = 0; i < count; i += channels)
        kernel.rprelu_backward(at(grad, type, first + i), at(x, type, first + i), type, channels,
                               shift_in, slope, false, at(grad_x, type, first + i), acc.data(),
                               acc.data() + channels, acc.data() + 2 * channels);
      for (int64_t i = 0; i < 3 * channels; ++i) to[i] = acc[i];
      return;
    }
    Repeated a, b;
    const void *in = a.of(shift_in, type, c), *s = b.of(slope, type, c);
    for (int64_t i = 0; i < count; i += kElements) {
      W acc[48] = {};
      kernel.rprelu_backward(at(grad, type, first + i), at(x, type, first + i), type,
                             std::min(kElements, count - i), in, s, true,
                             at(grad_x, type, first + i), acc, acc + 16, acc + 32);
      for (int k = 0; k < 3; ++k)
        for (int lane = 0; lane < 16; ++lane) to[k] += acc[16 * k + lane];
    }
  });
  std::vector<double> total(3 * channels, 0.0);
  for (int64_t t = 0; t < tasks; ++t)
    for (int k = 0; k < 3; ++k)
      for (int64_t c = 0; c < width; ++c)
        total[k * channels + (rows ? c : t % channels)] += partial[(t * 3 + k) * width + c];
  for (int64_t i = 0; i < 3 * channels; ++i) sums[i] = static_cast<float>(total[i]);
}

}  // namespace

void rsign(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
           int64_t inner, const void* shift, void* out) {
  for_tasks(outer, channels, inner, [&](int64_t, int64_t first, int64_t count, int64_t c) {
    if (c >= 0) {
      Repeated a;
      return kernel.rsign(at(x, type, first), type, count, a.of(shift, type, c), true,
                          at(out, type, first));
    }
    for (int64_t i = 0; i < count; i += channels)
      kernel.rsign(at(x, type, first + i), type, channels, shift, false, at(out, type, first + i));
  });
}

void rprelu(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
            int64_t inner, const void* shift_in, const void* slope, const void* shift_out,
            void* out) {
  for_tasks(outer, channels, inner, [&](int64_t, int64_t first, int64_t count, int64_t c) {
    if (c >= 0) {
      Repeated a, b, d;
      return kernel.rprelu(at(x, type, first), type, count, a.of(shift_in, type, c),
                           b.of(slope, type, c), d.of(shift_out, type, c), true,
                           at(out, type, first));
    }
    for (int64_t i = 0; i < count; i += channels)
      kernel.rprelu(at(x, type, first + i), type, channels, shift_in, slope, shift_out, false,
                    at(out, type, first + i));
  });
}

void rprelu_backward(const Kernel& kernel, const void* grad, const void* x, DType type,
                     int64_t outer, int64_t channels, int64_t inner, const void* shift_in,
                     const void* slope, void* grad_x, float* sums) {
  const auto run = type == DType::kF64 ? backward_of<double> : backward_of<float>;
  run(kernel, grad, x, type, outer, channels, inner, shift_in, slope, grad_x, sums);
}

}  // namespace bitkernels
