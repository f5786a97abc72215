// torch.ops.bitkernels.rsign, rprelu and rprelu_backward on CPU tensors: checks and allocation
// around cpu/rprelu.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/rprelu.h"
#include "tensors.h"

namespace bitkernels {
namespace {

// Of a layer's input and its parameters per channel: where these agree with each other, the input
// is what does not fit.
void check_activation(const char* op, const Tensor& input,
                      const std::vector<std::pair<const char*, const Tensor*>>& vectors) {
  check_real(op, "input", input);
  if (input.dim() < 2) fail(op, "input", "(N, C, ...)", describe(input));
  const int64_t channels = input.size(1);
  bool agree = true;
  for (const auto& [arg, t] : vectors) check_cpu(op, arg, *t);
  for (const auto& [arg, t] : vectors)
    agree = agree && t->dim() == 1 && t->numel() == vectors.front().second->numel();
  for (const auto& [arg, t] : vectors) {
    if (!agree || t->size(0) == channels) {
      check_channel_vector(op, arg, *t, channels);
      continue;
    }
    check_real(op, arg, *t);
    fail(op, "input",
         text(t->size(0), " channels wide for a ", arg, " of shape ", tuple_text(t->sizes())),
         text(channels, " channels in ", describe(input)));
  }
}

Tensor op_rsign(Tensor input, Tensor shift, std::string estimator, OptFloat clip, double) {
  const char* op = "rsign";
  if (shift.dim() == 1)
    check_activation(op, input, {{"shift", &shift}});
  else
    check_activation(op, input, {});
  const int64_t samples = check_shift(op, input, shift, 1);
  bool known = false;
  for (const char* name : {"ste_sign", "approx_sign", "swish_sign", "identity", "none"})
    known |= estimator == name;
  if (!known)
    fail(op, "estimator", "one of ste_sign, approx_sign, swish_sign, identity, none",
         text("'", estimator, "'"));
  if (clip && !(*clip >= 0)) fail(op, "clip", "at least 0", text(*clip));
  const Around x = around(input, 1);
  const WideVector wide(shift, input.scalar_type() == ScalarType::Double);
  Tensor out = dense_like(x.tensor);
  if (input.numel() > 0)
    rsign(kernel(), x.tensor.const_data_ptr(), dtype_of(input.scalar_type()), x.outer, x.channels,
          x.inner, wide.get(), samples, out.mutable_data_ptr());
  return out;
}

Tensor op_rprelu(Tensor input, Tensor shift_in, Tensor slope, Tensor shift_out) {
  const char* op = "rprelu";
  check_activation(op, input,
                   {{"shift_in", &shift_in}, {"slope", &slope}, {"shift_out", &shift_out}});
  const bool wide = input.scalar_type() == ScalarType::Double;
  const WideVector a(shift_in, wide), b(slope, wide), c(shift_out, wide);
  const Around x = around(input, 1);
  Tensor out = dense_like(x.tensor);
  if (input.numel() > 0)
    rprelu(kernel(), x.tensor.const_data_ptr(), dtype_of(input.scalar_type()), x.outer, x.channels,
           x.inner, a.get(), b.get(), c.get(), out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> op_rprelu_backward(Tensor grad, Tensor input,
                                                              Tensor shift_in, Tensor slope) {
  const char* op = "rprelu_backward";
  check_activation(op, input, {{"shift_in", &shift_in}, {"slope", &slope}});
  check_cpu(op, "grad", grad);
  const auto sizes = input.sizes();
  const Sizes shape(sizes.begin(), sizes.end()),
      grad_shape(grad.sizes().begin(), grad.sizes().end());
  if (grad.scalar_type() != input.scalar_type() || grad_shape != shape)
    fail(op, "grad", describe(input), describe(grad));
  const Around x = around(input, 1);
  // The gradient in the memory order of the input.
  Tensor g = dense_like(x.tensor);
  torch::stable::copy_(g, grad);
  const bool wide = input.scalar_type() == ScalarType::Double;
  const WideVector a(shift_in, wide), b(slope, wide);
  Tensor grad_x = dense_like(x.tensor);
  const int64_t c = input.size(1);
  std::vector<float> sums(3 * c, 0.0f);
  if (input.numel() > 0)
    rprelu_backward(kernel(), g.const_data_ptr(), x.tensor.const_data_ptr(),
                    dtype_of(input.scalar_type()), x.outer, c, x.inner, a.get(), b.get(),
                    grad_x.mutable_data_ptr(), sums.data());
  const auto vector = [&](int64_t i) {
    Tensor t = empty({c}, ScalarType::Float);
    std::copy(sums.begin() + i * c, sums.begin() + (i + 1) * c,
              static_cast<float*>(t.mutable_data_ptr()));
    return t;
  };
  return {grad_x, vector(0), vector(1), vector(2)};
}

}  // namespace
}  // namespace bitkernels

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CPU, m) {
  m.impl("rsign", TORCH_BOX(&bitkernels::op_rsign));
  m.impl("rprelu", TORCH_BOX(&bitkernels::op_rprelu));
  m.impl("rprelu_backward", TORCH_BOX(&bitkernels::op_rprelu_backward));
}
