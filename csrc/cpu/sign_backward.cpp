#include "sign_backward.h"

#include "sums.h"

namespace bitkernels {
namespace {

// Moves the pointers on.
void advance(SignBackward& s, int64_t elements) {
  const int64_t bytes = elements * size_of(s.type);
  s.grad = static_cast<const char*>(s.grad) + elements * size_of(s.grad_type);
  s.x = static_cast<const char*>(s.x) + bytes;
  if (s.add) s.add = static_cast<const char*>(s.add) + bytes;
  s.out = static_cast<char*>(s.out) + bytes;
}

template <class W>
void sign_backward_of(const Kernel& kernel, const SignBackward& all, const Sums& sums,
                      double* total) {
  const W* shift = static_cast<const W*>(all.shift);
  if (sums.inner == 1) {
    sums.rows<W>(
        [&](int64_t row, int64_t rows, int64_t c, int64_t n, W* sum) {
          SignBackward s = all;
          s.n = n;
          s.shift = shift ? shift + c : nullptr;
          s.sum = sum;
          advance(s, row * sums.channels + c);
          for (int64_t i = 0; i < rows; ++i, advance(s, sums.channels)) kernel.sign_backward(s);
        },
        total);
    return;
  }
  sums.planes<W>(
      [&](int64_t first, int64_t n, int64_t c, W* sum) {
        Repeated repeated;
        SignBackward s = all;
        s.n = n;
        s.shift = shift ? repeated.of(shift, all.type, c) : nullptr;
        s.repeat = true;
        s.sum = sum;
        advance(s, first);
        kernel.sign_backward(s);
      },
      total);
}

}  // namespace

void sign_backward(const Kernel& kernel, const SignBackward& rows, int64_t outer, int64_t channels,
                   int64_t inner, double* sum) {
  const auto run = rows.type == DType::kF64 ? sign_backward_of<double> : sign_backward_of<float>;
  run(kernel, rows, {outer, channels, inner, 1}, sum);
}

}  // namespace bitkernels
