// torch.ops.bitkernels.packed_max_pool2d on CPU tensors: checks and allocation around
// cpu/packed_max_pool2d.h.
#include <torch/csrc/stable/ops.h>

#include "box.h"
#include "cpu/packed_max_pool2d.h"
#include "tensors.h"

namespace bitkernels {
namespace {

Tensor op_max_pool2d(Tensor words, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation,
                     bool ceil_mode) {
  const char* op = "packed_max_pool2d";
  if (words.scalar_type() != ScalarType::Int || words.dim() != 4)
    fail(op, "words", "int32 words of shape (N, H, W, words)", describe(words));
  const auto k = pair(op, "kernel_size", kernel_size, 1);
  const auto s = stride.empty() ? k : pair(op, "stride", stride, 1);
  const auto p = pair(op, "padding", padding, 0);
  const auto d = pair(op, "dilation", dilation, 1);
  const auto out_size = [&](int64_t size, int64_t kernel, int64_t step, int64_t pad, int64_t dil) {
    if (2 * pad > kernel)
      fail(op, "padding", "at most half of kernel_size", list_text(Sizes{p.first, p.second}));
    const int64_t reach = dil * (kernel - 1) + 1, padded = size + 2 * pad;
    if (padded < reach)
      fail(op, "kernel_size", text("at most the padded input size ", padded),
           text("a reach of ", reach));
    int64_t o = (padded - reach + (ceil_mode ? step - 1 : 0)) / step + 1;
    if (ceil_mode && (o - 1) * step >= size + pad) --o;
    return o;
  };
  const Tensor in = dense(words);
  Pool pool = {
      words.size(0), words.size(1), words.size(2), words.size(3), k.first,  k.second, s.first,
      s.second,      p.first,       p.second,      d.first,       d.second, 0,        0};
  pool.out_h = out_size(pool.height, k.first, s.first, p.first, d.first);
  pool.out_w = out_size(pool.width, k.second, s.second, p.second, d.second);
  Tensor out = empty({pool.batch, pool.out_h, pool.out_w, pool.words}, ScalarType::Int);
  packed_max_pool2d(pool, words_of(in), mutable_words(out));
  return out;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl(BOX("packed_max_pool2d", &bitkernels::op_max_pool2d));
}
