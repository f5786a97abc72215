#include "rprelu.h"

#include "tasks.h"

namespace bitkernels {
namespace {

template <class W>
void backward_of(const Kernel& kernel, const void* grad, const void* x, DType type, int64_t outer,
                 int64_t channels, int64_t inner, const void* shift_in, const void* slope,
                 void* grad_x, float* sums) {
  const Tasks tasks = {outer, channels, inner, true};
  const int64_t width = tasks.width();
  std::vector<double> partial(tasks.count() * 3 * width, 0.0);
  tasks.run([&](int64_t t, int64_t first, int64_t count, int64_t c) {
    double* to = partial.data() + t * 3 * width;
    if (c < 0) {
      std::vector<W> acc(3 * channels, W(0));
      for (int64_t i = 0; i < count; i += channels)
        kernel.rprelu_backward(at(grad, type, first + i), at(x, type, first + i), type, channels,
                               shift_in, slope, false, at(grad_x, type, first + i), acc.data(),
                               acc.data() + channels, acc.data() + 2 * channels);
      for (int64_t i = 0; i < 3 * channels; ++i) to[i] += acc[i];
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
  std::vector<double> total(3 * channels);
  tasks.add_up(partial, 3, total.data());
  for (int64_t i = 0; i < 3 * channels; ++i) sums[i] = static_cast<float>(total[i]);
}

}  // namespace

void rprelu(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
            int64_t inner, const void* shift_in, const void* slope, const void* shift_out,
            void* out) {
  Tasks{outer, channels, inner}.run([&](int64_t, int64_t first, int64_t count, int64_t c) {
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
