// torch.ops.bitkernels.packed_min_pool2d on CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/packed_min_pool2d.h"
#include "tensors.h"

namespace bitkernels {
namespace {

Tensor op_min_pool2d(Tensor words, Sizes kernel_size, Sizes stride) {
  const char* op = "packed_min_pool2d";
  if (words.scalar_type() != ScalarType::Int || words.dim() != 4)
    fail(op, "words", "int32 words of shape (N, H, W, words)", describe(words));
  const auto k = pair(op, "kernel_size", kernel_size, 1);
  const auto s = stride.empty() ? k : pair(op, "stride", stride, 1);
  const auto out_size = [&](int64_t size, int64_t kernel, int64_t step) {
    if (size < kernel)
      fail(op, "kernel_size", text("at most the padded input size ", size),
           text("a reach of ", kernel));
    return (size - kernel) / step + 1;
  };
  const Tensor in = dense(words);
  Pool pool = {
      words.size(0), words.size(1), words.size(2), words.size(3), k.first, k.second, s.first,
      s.second,      0,             0,             1,             1,       0,        0};
  pool.out_h = out_size(pool.height, k.first, s.first);
  pool.out_w = out_size(pool.width, k.second, s.second);
  Tensor out = empty({pool.batch, pool.out_h, pool.out_w, pool.words}, ScalarType::Int);
  packed_min_pool2d(pool, words_of(in), mutable_words(out));
  return out;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl("packed_min_pool2d", TORCH_BOX(&bitkernels::op_min_pool2d));
}
