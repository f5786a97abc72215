// torch.ops.bitkernels.sign_pack, sign_pack_mask, mask_grad, unpack and tile_weight on CPU tensors:
// checks and allocation around the engine's sources of these names.
#include <torch/csrc/stable/ops.h>

#include "box.h"
#include "cpu/mask_grad.h"
#include "cpu/sign_pack.h"
#include "cpu/tile_weight.h"
#include "cpu/unpack.h"
#include "words.h"

namespace bitkernels {

std::tuple<Tensor, OptTensor> pack(const char* op, const Tensor& input, OptFloat clip,
                                   const OptTensor& shift, int64_t dim) {
  check_real(op, "input", input);
  dim = normalize_dim(op, input, dim);
  const int64_t channels = input.size(dim);
  if (channels < 1) fail(op, "input", "at least 1 channel wide", describe(input));
  const int64_t samples = check_shift(op, input, shift, dim);
  if (clip && !(*clip >= 0)) fail(op, "clip", "at least 0", text(*clip));
  const Kernel& k = kernel();
  const Around x = around(input, dim);
  const WideVector wide(shift, input.scalar_type() == ScalarType::Double);
  Tensor signs = empty(packed_shape(input, dim), ScalarType::Int);
  OptTensor mask;
  if (clip) mask = empty(packed_shape(input, dim), ScalarType::Int);
  if (input.numel() > 0)
    sign_pack(k, x.tensor.const_data_ptr(), dtype_of(input.scalar_type()), x.outer, channels,
              x.inner, wide.get(), samples, clip.value_or(0), mutable_words(signs),
              mask ? mutable_words(*mask) : nullptr);
  return {signs, mask};
}

Tensor tiled(const Tensor& weight_words, int64_t out_channels, int64_t groups) {
  const Tensor w = dense(weight_words);
  Sizes shape(w.sizes().begin(), w.sizes().end());
  const int64_t per_group = out_channels / groups;
  shape[0] = groups * ((per_group + kTile - 1) / kTile);
  shape.push_back(kTile);
  Tensor out = empty(shape, ScalarType::Int);
  tile_weight(words_of(w), groups, per_group, out_channels ? w.numel() / out_channels : 0,
              mutable_words(out));
  return out;
}

namespace {

Tensor op_sign_pack(Tensor input, OptTensor shift, int64_t dim) {
  return std::get<0>(pack("sign_pack", input, std::nullopt, shift, dim));
}

std::tuple<Tensor, Tensor> op_sign_pack_mask(Tensor input, double clip, OptTensor shift,
                                             int64_t dim) {
  auto [signs, mask] = pack("sign_pack_mask", input, clip, shift, dim);
  return {signs, *mask};
}

Tensor op_tile_weight(Tensor weight_words, int64_t groups) {
  const char* op = "tile_weight";
  if (weight_words.scalar_type() != ScalarType::Int ||
      (weight_words.dim() != 2 && weight_words.dim() != 4))
    fail(op, "weight_words", "int32 words of shape (Cout, kh, kw, words) or (Cout, words)",
         describe(weight_words));
  const int64_t cout = weight_words.size(0);
  if (groups < 1 || cout % groups)
    fail(op, "groups", text("a divisor of ", cout, " output channels"), text(groups));
  return tiled(weight_words, cout, groups);
}

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
  const Tensor mask = dense(mask_words), out = empty_around(g);
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

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl(BOX("sign_pack", &bitkernels::op_sign_pack));
  m.impl(BOX("sign_pack_mask", &bitkernels::op_sign_pack_mask));
  m.impl(BOX("tile_weight", &bitkernels::op_tile_weight));
  m.impl(BOX("mask_grad", &bitkernels::op_mask_grad));
  m.impl(BOX("unpack", &bitkernels::op_unpack));
}
