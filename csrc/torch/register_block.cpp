// torch.ops.bitkernels.residual_block_* on CPU tensors: checks and allocation around
// cpu/residual_block.h.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "box.h"
#include "cpu/residual_block.h"
#include "tensors.h"

namespace bitkernels {
namespace {

// What the three operators share; the vectors live as long as this does.
class Rows {
 public:
  Rows(const char* op, const Tensor& dot, ScalarType type, bool relu)
      : op_(op), dot_(dot), double_(type == ScalarType::Double) {
    const ScalarType d = dot.scalar_type();
    check_cpu(op, "dot", dot);
    if ((d != ScalarType::Short && d != ScalarType::Int) || dot.dim() != 4)
      fail(op, "dot", "int16 or int32 of shape (N, C, H, W)", describe(dot));
    dot_ = as_rows(dot);
    rows.channels = dot.size(1);
    rows.rows = dot.size(0) * dot.size(2) * dot.size(3);
    rows.dot = dot_.const_data_ptr();
    rows.short_dot = d == ScalarType::Short;
    rows.relu = relu;
    rows.type = rows.out_type = dtype_of(type);
    vectors_.reserve(8);  // so that none moves
  }
  const void* vector(const char* name, const OptTensor& t) {
    check_channel_vector(op_, name, t, rows.channels);
    vectors_.emplace_back(t, double_);
    return vectors_.back().get();
  }
  const void* real(const char* name, const Tensor& t, ScalarType type) {
    check_cpu(op_, name, t);
    const auto sizes = dot_.sizes();
    const Sizes shape(sizes.begin(), sizes.end());
    if (Sizes(t.sizes().begin(), t.sizes().end()) != shape || t.scalar_type() != type)
      fail(op_, name, text(name_of(type), " of shape ", tuple_text(shape)), describe(t));
    return kept_.emplace_back(as_rows(t)).const_data_ptr();
  }
  Tensor output(ScalarType type) {
    Tensor out = empty_rows(dot_, type);
    rows.out = out.mutable_data_ptr();
    rows.out_type = dtype_of(type);
    return out;
  }
  bool any() const { return rows.rows > 0 && rows.channels > 0; }

  BlockRows rows;

 private:
  const char* op_;
  Tensor dot_;
  bool double_;
  std::vector<WideVector> vectors_;
  std::vector<Tensor> kept_;
};

Tensor op_block_forward(Tensor dot, Tensor residual, Tensor scale, Tensor bias, OptTensor shift_in,
                        OptTensor slope, OptTensor shift_out, bool relu) {
  const char* op = "residual_block_forward";
  check_real(op, "residual", residual);
  const ScalarType type = residual.scalar_type();
  Rows r(op, dot, type, relu);
  r.rows.residual = r.real("residual", residual, type);
  r.rows.scale = r.vector("scale", scale);
  r.rows.bias = r.vector("bias", bias);
  r.rows.shift_in = r.vector("shift_in", shift_in);
  r.rows.slope = r.vector("slope", slope);
  r.rows.shift_out = r.vector("shift_out", shift_out);
  Tensor out = r.output(type);
  if (r.any()) block_forward(kernel(), r.rows);
  return out;
}

std::tuple<Tensor, Tensor> op_block_backward(Tensor grad, Tensor dot, OptTensor residual,
                                             Tensor scale, Tensor bias, OptTensor shift_in,
                                             OptTensor slope, Tensor center, bool relu) {
  const char* op = "residual_block_backward";
  check_real(op, "grad", grad);
  const ScalarType type = grad.scalar_type();
  Rows r(op, dot, type, relu);
  r.rows.grad = r.real("grad", grad, type);
  r.rows.scale = r.vector("scale", scale);
  r.rows.bias = r.vector("bias", bias);
  r.rows.shift_in = r.vector("shift_in", shift_in);
  r.rows.slope = r.vector("slope", slope);
  r.rows.center = r.vector("center", center);
  Tensor out = slope ? r.output(type) : empty({0}, type);
  if (slope) {
    if (!residual) fail(op, "residual", "given with slope", "None");
    r.rows.residual = r.real("residual", *residual, type);
  }
  Tensor sums = empty({4, r.rows.channels}, ScalarType::Double);
  auto* to = static_cast<double*>(sums.mutable_data_ptr());
  std::fill(to, to + 4 * r.rows.channels, 0.0);
  if (r.any()) block_backward(kernel(), r.rows, to);
  return {out, sums};
}

Tensor op_norm_backward(Tensor grad, Tensor dot, Tensor p, Tensor q, Tensor r, Tensor center,
                        bool relu, ScalarType dtype) {
  const char* op = "residual_block_norm_backward";
  check_real(op, "grad", grad);
  const ScalarType type = grad.scalar_type();
  if (!is_real(dtype) || (dtype == ScalarType::Double) != (type == ScalarType::Double))
    fail(op, "dtype", "a real type, float64 for float64 only", text("torch.", name_of(dtype)));
  Rows rows(op, dot, type, relu);
  rows.rows.grad = rows.real("grad", grad, type);
  rows.rows.p = rows.vector("p", p);
  rows.rows.q = rows.vector("q", q);
  rows.rows.r = rows.vector("r", r);
  rows.rows.center = rows.vector("center", center);
  Tensor out = rows.output(dtype);
  if (rows.any()) norm_backward(kernel(), rows.rows);
  return out;
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl(BOX("residual_block_forward", &bitkernels::op_block_forward));
  m.impl(BOX("residual_block_backward", &bitkernels::op_block_backward));
  m.impl(BOX("residual_block_norm_backward", &bitkernels::op_norm_backward));
}
