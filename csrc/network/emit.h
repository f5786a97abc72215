// How each operator becomes steps.
#pragma once
#include "lowering.h"

namespace bitkernels::network {

void emit_sign_pack(Lowering&, const Call&, int node);
void emit_packed_conv(Lowering&, const Call&, int node);
void emit_packed_linear(Lowering&, const Call&, int node);
void emit_packed_pool(Lowering&, const Call&, int node);
void emit_transposed(Lowering&, const Call&, int node);
void emit_rprelu(Lowering&, const Call&, int node);
void emit_rsign(Lowering&, const Call&, int node);
void emit_unpack(Lowering&, const Call&, int node);
void emit_conv(Lowering&, const Call&, int node);
void emit_linear(Lowering&, const Call&, int node);
void emit_int8_conv(Lowering&, const Call&, int node);
void emit_int8_linear(Lowering&, const Call&, int node);
void emit_max_pool(Lowering&, const Call&, int node);
void emit_avg_pool(Lowering&, const Call&, int node);
void emit_adaptive_pool(Lowering&, const Call&, int node);
void emit_mean(Lowering&, const Call&, int node);
void emit_softmax(Lowering&, const Call&, int node);
void emit_pad(Lowering&, const Call&, int node);
void emit_sigmoid(Lowering&, const Call&, int node);
void emit_unary(Lowering&, const Call&, int node);
void emit_binary(Lowering&, const Call&, int node);
void emit_where(Lowering&, const Call&, int node);
void emit_cat(Lowering&, const Call&, int node);
void emit_view(Lowering&, const Call&, int node);
inline void emit_nothing(Lowering&, const Call&, int) {}

// The chain that ends in a node and has no convolution in front.
void emit_affine(Lowering&, int node);

}  // namespace bitkernels::network
