// torch.ops.bitkernels.rsign, sign_backward, rprelu and rprelu_backward on CPU tensors: checks and
// allocation around the engine's sources of these names.
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "box.h"
#include "cpu/rprelu.h"
#include "cpu/rsign.h"
#include "cpu/sign_backward.h"
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

void check_beta(const char* op, double beta, const std::string& estimator) {
  if (estimator == "swish_sign" && !(beta > 0 && beta < std::numeric_limits<double>::infinity()))
    fail(op, "beta", "above 0 and finite", text(beta));
}

Tensor op_rsign(Tensor input, Tensor shift, std::string estimator, OptFloat clip, double beta) {
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
  check_beta(op, beta, estimator);
  const Around x = around(input, 1);
  const WideVector wide(shift, input.scalar_type() == ScalarType::Double);
  Tensor out = empty_around(x);
  if (input.numel() > 0)
    rsign(kernel(), x.tensor.const_data_ptr(), dtype_of(input.scalar_type()), x.outer, x.channels,
          x.inner, wide.get(), samples, out.mutable_data_ptr());
  return out;
}

Estimator estimator_of(const char* op, const std::string& name, const OptFloat& clip) {
  if (name == "ste_sign") return clip ? Estimator::kSte : Estimator::kIdentity;
  if (name == "approx_sign") return Estimator::kApprox;
  if (name == "swish_sign") return Estimator::kSwish;
  if (name != "identity")
    fail(op, "estimator", "one of ste_sign, approx_sign, swish_sign, identity",
         text("'", name, "'"));
  return Estimator::kIdentity;
}

std::tuple<Tensor, Tensor> op_sign_backward(Tensor grad, Tensor input, OptTensor shift,
                                            OptTensor add, std::string estimator, OptFloat clip,
                                            double beta) {
  const char* op = "sign_backward";
  check_real(op, "input", input);
  check_real(op, "grad", grad);
  if (input.dim() < 2) fail(op, "input", "(N, C, ...)", describe(input));
  const int64_t channels = input.size(1);
  check_channel_vector(op, "shift", shift, channels);
  if (clip && !(*clip >= 0)) fail(op, "clip", "at least 0", text(*clip));
  check_beta(op, beta, estimator);
  const ScalarType type = input.scalar_type();
  const bool wide = type == ScalarType::Double;
  const Sizes shape(input.sizes().begin(), input.sizes().end());
  const auto same = [&](const char* name, const Tensor& t, bool any_type) {
    check_cpu(op, name, t);
    if (Sizes(t.sizes().begin(), t.sizes().end()) != shape ||
        (any_type ? (t.scalar_type() == ScalarType::Double) != wide : t.scalar_type() != type))
      fail(op, name, describe(input), describe(t));
  };
  same("grad", grad, true);
  if (add) same("add", *add, false);

  const Around x = around(input, 1);
  const auto in_order = [&](const Tensor& t) {  // in the memory order of the input
    const auto a = t.strides(), b = x.tensor.strides();
    if (Sizes(a.begin(), a.end()) == Sizes(b.begin(), b.end())) return t;
    Tensor copy = empty_strided(shape, {b.begin(), b.end()}, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  };
  const Tensor g = in_order(grad);
  const OptTensor extra = add ? OptTensor(in_order(*add)) : std::nullopt;
  const WideVector vector(shift, wide);
  Tensor out = empty_around(x);
  Tensor sum = empty({channels}, ScalarType::Double);
  auto* to = static_cast<double*>(sum.mutable_data_ptr());
  std::fill(to, to + channels, 0.0);
  SignBackward s;
  s.estimator = estimator_of(op, estimator, clip);
  s.grad = g.const_data_ptr();
  s.x = x.tensor.const_data_ptr();
  s.add = extra ? extra->const_data_ptr() : nullptr;
  s.grad_type = dtype_of(g.scalar_type());
  s.type = dtype_of(type);
  s.shift = vector.get();
  s.clip = clip.value_or(0);
  s.beta = beta;
  s.out = out.mutable_data_ptr();
  if (input.numel() > 0) sign_backward(kernel(), s, x.outer, channels, x.inner, to);
  return {out, sum};
}

Tensor op_rprelu(Tensor input, Tensor shift_in, Tensor slope, Tensor shift_out) {
  const char* op = "rprelu";
  check_activation(op, input,
                   {{"shift_in", &shift_in}, {"slope", &slope}, {"shift_out", &shift_out}});
  const bool wide = input.scalar_type() == ScalarType::Double;
  const WideVector a(shift_in, wide), b(slope, wide), c(shift_out, wide);
  const Around x = around(input, 1);
  Tensor out = empty_around(x);
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
  Tensor g = empty_around(x);
  torch::stable::copy_(g, grad);
  const bool wide = input.scalar_type() == ScalarType::Double;
  const WideVector a(shift_in, wide), b(slope, wide);
  Tensor grad_x = empty_around(x);
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
  m.impl(BOX("rsign", &bitkernels::op_rsign));
  m.impl(BOX("sign_backward", &bitkernels::op_sign_backward));
  m.impl(BOX("rprelu", &bitkernels::op_rprelu));
  m.impl(BOX("rprelu_backward", &bitkernels::op_rprelu_backward));
}
