#include "residual_block.h"

#include "sums.h"

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

// One row's n channels from c on.
BlockRows part(const BlockRows& rows, int64_t row, int64_t c, int64_t n) {
  BlockRows b = rows;
  b.channels = 1;
  b = part(b, row * rows.channels + c, 1);
  b.channels = n;
  const DType wide = b.type == DType::kF64 ? b.type : DType::kF32;
  for (const void** vector : {&b.scale, &b.bias, &b.shift_in, &b.slope, &b.center})
    *vector = at(*vector, wide, c);
  return b;
}

template <class F>
void for_parts(const BlockRows& rows, const F& f) {
  Tasks{rows.rows, rows.channels, 1}.run([&](int64_t first, int64_t count, int64_t) {
    f(part(rows, first / rows.channels, count / rows.channels));
  });
}

template <class W>
void backward_of(const Kernel& kernel, const BlockRows& all, double* total) {
  const auto run = [&](BlockRows b, W* sums) {
    b.sums = sums;
    kernel.block_backward(b);
  };
  Sums{all.rows, all.channels, 1, 4}.rows<W>(
      [&](int64_t row, int64_t rows, int64_t c, int64_t n, W* sums) {
        if (n == all.channels) return run(part(all, row, rows), sums);
        for (int64_t i = row; i < row + rows; ++i) run(part(all, i, c, n), sums);
      },
      total);
}

}  // namespace

void block_forward(const Kernel& kernel, const BlockRows& rows) {
  for_parts(rows, [&](const BlockRows& b) { kernel.block_forward(b); });
}

void block_backward(const Kernel& kernel, const BlockRows& rows, double* sums) {
  const auto run = rows.type == DType::kF64 ? backward_of<double> : backward_of<float>;
  run(kernel, rows, sums);
}

void norm_backward(const Kernel& kernel, const BlockRows& rows) {
  for_parts(rows, [&](const BlockRows& b) { kernel.norm_backward(b); });
}

}  // namespace bitkernels
