// torch.ops.bitkernels.mask_grad, unpack and packed_max_pool2d on CPU tensors: checks and
// allocation around cpu/sign_pack.h and cpu/packed_max_pool2d.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/packed_max_pool2d.h"
#include "cpu/sign_pack.h"
#include "tensors.h"

namespace bitkernels {
namespace {

Tensor op_mask_grad(Tensor grad, Tensor mask_words, int64_t dim) {
  const char* op = "mask_grad";
  check_real(op, "grad", grad);
  dim = normalize_dim(op, grad, dim);
  check_words(op, "mask_words", mask_words, grad.size(dim), grad.dim());
  const Sizes shape = packed_shape(grad, dim);
  for (size_t i = 0; i < shape.size(); ++i)
    if (mask_words.size(static_cast<int64_t>(i)) != shape[i])
      fail(op, "mask_words", text("of shape ", tuple_text(shape)), describe(mask_words));
  const Kernel& k = kernel();
  const Around g = around(grad, dim);
  const Tensor mask = dense(mask_words), out = dense_like(g.tensor);
  if (grad.numel() > 0)
    mask_grad(k, g.tensor.const_data_ptr(), dtype_of(grad.scalar_type()), g.outer, g.channels,
              g.inner, words_of(mask), out.mutable_data_ptr());
  return out;
}

Tensor op_unpack(Tensor words, int64_t channels, ScalarType dtype, int64_t dim) {
  const char* op = "unpack";
  check_words(op, "words", words, channels);
  if (!is_real(dtype))
    fail(op, "dtype", "float32, float16, bfloat16 or float64", text("torch.", name_of(dtype)));
  dim = normalize_dim(op, words, dim);
  const Tensor in = dense(words);
  // Channels stay innermost in memory and move to `dim` in the shape.
  Sizes sizes, strides;
  int64_t step = channels;
  for (int64_t i = words.dim() - 2; i >= 0; --i) {
    sizes.insert(sizes.begin(), words.size(i));
    strides.insert(strides.begin(), step);
    step *= std::max<int64_t>(words.size(i), 1);
  }
  sizes.insert(sizes.begin() + dim, channels);
  strides.insert(strides.begin() + dim, 1);
  Tensor out = empty_strided(sizes, strides, dtype);
  const int64_t rows = words.numel() / word_count(channels);
  unpack(kernel(), words_of(in), dtype_of(dtype), rows, channels, out.mutable_data_ptr());
  return out;
}

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
  m.impl("mask_grad", TORCH_BOX(&bitkernels::op_mask_grad));
  m.impl("unpack", TORCH_BOX(&bitkernels::op_unpack));
  m.impl("packed_max_pool2d", TORCH_BOX(&bitkernels::op_max_pool2d));
}
