// Types and sizes of what each operator gives, for given ones of what it takes; each checks its
// arguments as PyTorch does and throws Error.
#pragma once
#include "ops.h"

namespace bitkernels::network {

// A tensor of a type, whose bytes have to fit.
inline Value of(const Type& type) {
  Value v;
  v.type = type;
  v.type.bytes();
  return v;
}

Value infer_sign_pack(const Call&);
Value infer_packed_conv(const Call&);
Value infer_packed_linear(const Call&);
Value infer_packed_pool(const Call&);
Value infer_transposed(const Call&);
Value infer_rprelu(const Call&);
Value infer_rsign(const Call&);
Value infer_unpack(const Call&);

Value infer_conv(const Call&);
Value infer_linear(const Call&);
Value infer_int8_conv(const Call&);
Value infer_int8_linear(const Call&);
Value infer_norm(const Call&);
Value infer_max_pool(const Call&);
Value infer_avg_pool(const Call&);
Value infer_adaptive_pool(const Call&);
Value infer_mean(const Call&);
Value infer_softmax(const Call&);
Value infer_pad(const Call&);
Value infer_same(const Call&);
Value infer_gelu(const Call&);
Value infer_prelu(const Call&);
Value infer_binary(const Call&);
Value infer_compare(const Call&);
Value infer_and(const Call&);
Value infer_where(const Call&);

Value infer_cat(const Call&);
Value infer_slice(const Call&);
Value infer_flatten(const Call&);
Value infer_reshape(const Call&);
Value infer_permute(const Call&);
Value infer_transpose(const Call&);
Value infer_unsqueeze(const Call&);
Value infer_squeeze(const Call&);
Value infer_copy(const Call&);
Value infer_size(const Call&);
Value infer_getitem(const Call&);
Value infer_integer(const Call&);

}  // namespace bitkernels::network
