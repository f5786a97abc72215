#include "rprelu.h"

#include "sums.h"

namespace bitkernels {
namespace {

template <class W>
void backward_of(const Kernel& kernel, const void* grad, const void* x, DType type, int64_t outer,
                 int64_t channels, int64_t inner, const void* shift_in, const void* slope,
                 void* grad_x, float* sums) {
  const Sums of = {outer, channels, inner, 3};
  std::vector<double> total(3 * channels);
  if (inner == 1) {
    const W *in = static_cast<const W*>(shift_in), *s = static_cast<const W*>(slope);
    of.rows<W>(
        [&](int64_t row, int64_t rows, int64_t c, int64_t n, W* sum) {
          for (int64_t i = row * channels + c; i < (row + rows) * channels; i += channels)
            kernel.rprelu_backward(at(grad, type, i), at(x, type, i), type, n, in + c, s + c, false,
                                   at(grad_x, type, i), sum, sum + n, sum + 2 * n);
        },
        total.data());
  } else {
    of.planes<W>(
        [&](int64_t first, int64_t n, int64_t c, W* sum) {
          Repeated a, b;
          kernel.rprelu_backward(at(grad, type, first), at(x, type, first), type, n,
                                 a.of(shift_in, type, c), b.of(slope, type, c), true,
                                 at(grad_x, type, first), sum, sum + 16, sum + 32);
        },
        total.data());
  }
  for (int64_t i = 0; i < 3 * channels; ++i) sums[i] = static_cast<float>(total[i]);
}

}  // namespace

void rprelu(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
            int64_t inner, const void* shift_in, const void* slope, const void* shift_out,
            void* out) {
  Tasks{outer, channels, inner}.run([&](int64_t first, int64_t count, int64_t c) {
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
