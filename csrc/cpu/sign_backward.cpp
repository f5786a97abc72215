#include "sign_backward.h"

#include "tasks.h"

namespace bitkernels {
namespace {

template <class W>
void sign_backward_of(const Kernel& kernel, const SignBackward& all, const Tasks& tasks,
                      double* sum) {
  const int64_t width = tasks.width(), channels = tasks.channels;
  std::vector<double> partial(tasks.count() * width, 0.0);
  tasks.run([&](int64_t t, int64_t first, int64_t count, int64_t channel) {
    Repeated repeated;
    const bool rows = channel < 0;
    const int64_t step = rows ? channels : kElements;
    std::vector<W> acc(rows ? channels : 16, W(0));
    SignBackward s = all;
    s.repeat = !rows;
    s.sum = acc.data();
    if (s.shift && !rows) s.shift = repeated.of(s.shift, s.type, channel);
    for (int64_t i = first; i < first + count; i += step) {
      s.grad = at(all.grad, s.grad_type, i);
      s.x = at(all.x, s.type, i);
      s.add = at(all.add, s.type, i);
      s.out = at(all.out, s.type, i);
      s.n = std::min(step, first + count - i);
      kernel.sign_backward(s);
      if (rows) continue;
      for (W& lane : acc) {
        partial[t] += lane;
        lane = 0;
      }
    }
    for (int64_t i = 0; rows && i < width; ++i) partial[t * width + i] += acc[i];
  });
  tasks.add_up(partial, 1, sum);
}

}  // namespace

void sign_backward(const Kernel& kernel, const SignBackward& rows, int64_t outer, int64_t channels,
                   int64_t inner, double* sum) {
  const auto run = rows.type == DType::kF64 ? sign_backward_of<double> : sign_backward_of<float>;
  run(kernel, rows, {outer, channels, inner, true}, sum);
}

}  // namespace bitkernels
