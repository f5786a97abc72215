#include "residual_block.h"

#include "tasks.h"

namespace bitkernels {
namespace {

// `count` rows from `first` on.
BlockRows part(BlockRows b, int64_t first, int64_t count) {
  const int64_t element = first * b.channels;
  b.dot = static_cast<const char*>(b.dot) + element * (b.short_dot ? 2 : 4);
  b.residual = at(b.residual, b.type, element);
  b.grad = at(b.grad, b.type, element);
  b.out = at(b.out, b.out_type, element);
  b.rows = count;
  return b;
}

template <class F>
void for_parts(const BlockRows& rows, const Tasks& tasks, const F& f) {
  tasks.run([&](int64_t t, int64_t first, int64_t count, int64_t) {
    f(t, part(rows, first / rows.channels, count / rows.channels));
  });
}

template <class W>
void backward_of(const Kernel& kernel, const BlockRows& rows, double* sums) {
  const Tasks tasks = {rows.rows, rows.channels, 1, true};
  const int64_t width = 4 * rows.channels;
  std::vector<double> partial(tasks.count() * width, 0.0);
  for_parts(rows, tasks, [&](int64_t t, BlockRows b) {
    std::vector<W> acc(width, W(0));
    b.sums = acc.data();
    kernel.block_backward(b);
    for (int64_t i = 0; i < width; ++i) partial[t * width + i] += acc[i];
  });
  tasks.add_up(partial, 4, sums);
}

}  // namespace

void block_forward(const Kernel& kernel, const BlockRows& rows) {
  for_parts(rows, {rows.rows, rows.channels, 1},
            [&](int64_t, const BlockRows& b) { kernel.block_forward(b); });
}

void block_backward(const Kernel& kernel, const BlockRows& rows, double* sums) {
  const auto run = rows.type == DType::kF64 ? backward_of<double> : backward_of<float>;
  run(kernel, rows, sums);
}

void norm_backward(const Kernel& kernel, const BlockRows& rows) {
  for_parts(rows, {rows.rows, rows.channels, 1},
            [&](int64_t, const BlockRows& b) { kernel.norm_backward(b); });
}

}  // namespace bitkernels
