// Shapes of PyTorch's layers, pools and elementwise operators on float32.
#include <cstring>

#include "infer.h"

namespace bitkernels::network {
namespace {

// Output size along one axis.
int64_t steps(const Call& call, const char* name, int64_t size, int64_t before, int64_t after,
              int64_t taps, int64_t stride, int64_t dilation, bool ceil) {
  const int64_t room = plus(plus(size, before), after) - plus(times(dilation, taps - 1), 1);
  if (room < 0) call.wrong(name, "not larger than the padded input", text(taps, " on ", size));
  int64_t out = (room + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (out - 1) * stride >= size + before) --out;
  return out;
}

void check_vector(const Call& call, const char* name, int64_t channels) {
  if (!call.given(name)) return;
  if (call.real(name).sizes != Sizes{channels} || !call.constant(name))
    call.wrong(name, text("a constant of shape (", channels, ",)"), text_of(call.tensor(name)));
}

}  // namespace

Window conv_window(const Call& call, const Pads& pads) {
  const Sizes& f = call.real("weight", 4).sizes;
  const auto [sh, sw] = call.pair("stride", 1);
  const auto [ph, pw] = call.pair("padding", 0);
  const auto [dh, dw] = call.pair("dilation", 1);
  const Sizes& x = call.real("input", 4).sizes;
  Window w = {f[2], f[3], sh, sw, ph + pads.top, ph + pads.bottom, pw + pads.left, pw + pads.right,
              dh,   dw,   0,  0};
  // The sizes of `input` hold a fused pad already.
  const int64_t height = x[2] - pads.top - pads.bottom, width = x[3] - pads.left - pads.right;
  w.out_h = steps(call, "weight", height, w.top, w.bottom, w.kh, sh, dh, false);
  w.out_w = steps(call, "weight", width, w.left, w.right, w.kw, sw, dw, false);
  return w;
}

Value infer_conv(const Call& call) {
  const Sizes& x = call.real("input", 4).sizes;
  const Type& weight = call.real("weight", 4);
  const Sizes& f = weight.sizes;
  if (!call.constant("weight") || f.count() == 0)
    call.wrong("weight", "a constant that is not empty", text_of(weight));
  const int64_t groups = call.integer("groups", 1, f[0]);
  if (f[0] % groups || times(f[1], groups) != x[1])
    call.wrong("weight", text("of ", groups, " groups for ", x[1], " channels"), text_of(weight));
  check_vector(call, "bias", f[0]);
  const Window w = conv_window(call);
  return of({Element::kFloat32, {x[0], f[0], w.out_h, w.out_w}});
}

Value infer_linear(const Call& call) {
  Sizes out = call.real("input").sizes;
  const Type& weight = call.real("weight", 2);
  if (!call.constant("weight") || weight.sizes.count() == 0)
    call.wrong("weight", "a constant that is not empty", text_of(weight));
  if (out.rank < 1 || out.rank > 3 || out.back() != weight.sizes[1])
    call.wrong("input", text("of 1 to 3 dimensions, ", weight.sizes[1], " wide"), text_of(out));
  out[out.rank - 1] = weight.sizes[0];
  check_vector(call, "bias", weight.sizes[0]);
  return of({Element::kFloat32, out});
}

Value infer_norm(const Call& call) {
  const Type& x = call.real("input");
  if (x.sizes.rank != 2 && x.sizes.rank != 4)
    call.wrong("input", "of 2 or 4 dimensions", text_of(x));
  if (call.flag("training")) call.wrong("training", "False", "True");
  for (const char* name : {"running_mean", "running_var"})
    if (!call.given(name)) call.wrong(name, "a constant", "None");
  for (const char* name : {"weight", "bias", "running_mean", "running_var"})
    check_vector(call, name, x.sizes[1]);
  return of(x);
}

Window pool_window(const Call& call, int first, const Pads& pads) {
  const Sizes& x = call.tensor(first == 1 ? "words" : "self").sizes;
  const auto [kh, kw] = call.pair("kernel_size", 1);
  const bool own = !call.integers("stride").empty();
  const auto [sh, sw] = own ? call.pair("stride", 1) : std::pair(kh, kw);
  const auto [ph, pw] = call.pair("padding", 0);
  if (2 * ph > kh || 2 * pw > kw)
    call.wrong("padding", "at most half of kernel_size", text(ph, " and ", pw));
  const bool dilates = std::strstr(call.node.op->schema, "dilation") != nullptr;
  const auto [dh, dw] = dilates ? call.pair("dilation", 1) : std::pair<int64_t, int64_t>(1, 1);
  const bool ceil = call.flag("ceil_mode");
  Window w = {kh, kw, sh, sw, ph + pads.top, ph + pads.bottom, pw + pads.left, pw + pads.right,
              dh, dw, 0,  0};
  const int64_t height = x[first] - pads.top - pads.bottom;
  const int64_t width = x[first + 1] - pads.left - pads.right;
  w.out_h = steps(call, "kernel_size", height, w.top, w.bottom, kh, sh, dh, ceil);
  w.out_w = steps(call, "kernel_size", width, w.left, w.right, kw, sw, dw, ceil);
  return w;
}

Value infer_max_pool(const Call& call) {
  const Sizes& x = call.real("self", 4).sizes;
  const Window w = pool_window(call, 2);
  return of({Element::kFloat32, {x[0], x[1], w.out_h, w.out_w}});
}

Value infer_avg_pool(const Call& call) {
  if (call.given("divisor_override")) call.integer("divisor_override", 1, int64_t{1} << 31);
  const Sizes& x = call.real("self", 4).sizes;
  const Window w = pool_window(call, 2);
  return of({Element::kFloat32, {x[0], x[1], w.out_h, w.out_w}});
}

Value infer_adaptive_pool(const Call& call) {
  const Sizes& x = call.real("self", 4).sizes;
  if (x[2] < 1 || x[3] < 1) call.wrong("self", "at least 1 x 1 in size", text_of(x));
  const auto [h, w] = call.pair("output_size", 1);
  return of({Element::kFloat32, {x[0], x[1], h, w}});
}

std::vector<int> reduced_dims(const Call& call, const Type& input) {
  std::vector<int> dims;
  for (int64_t d : call.integers("dim")) dims.push_back(call.dim_of("dim", d, input.sizes.rank));
  if (dims.empty())
    for (int i = 0; i < input.sizes.rank; ++i) dims.push_back(i);
  std::sort(dims.begin(), dims.end());
  if (std::adjacent_find(dims.begin(), dims.end()) != dims.end())
    call.wrong("dim", "different dimensions", "one twice");
  return dims;
}

Value infer_mean(const Call& call) {
  Type x = call.real("self");
  const bool keep = call.flag("keepdim");
  const std::vector<int> dims = reduced_dims(call, x);
  if (call.given("dtype") && call.arg("dtype").name != "float32")
    call.wrong("dtype", "float32", call.arg("dtype").name);
  for (auto d = dims.rbegin(); d != dims.rend() && x.sizes.rank > 0; ++d) {
    if (x.sizes[*d] < 1) call.wrong("self", "not empty", text_of(x));
    if (keep)
      x.sizes[*d] = 1;
    else
      x.sizes.erase(*d);
  }
  return of(x);
}

Value infer_softmax(const Call& call) {
  const Type& x = call.real("self");
  call.dim("dim", x.sizes.rank);
  if (call.given("dtype") && call.arg("dtype").name != "float32")
    call.wrong("dtype", "float32", call.arg("dtype").name);
  return of(x);
}

std::vector<int64_t> pads_of(const Call& call, const Type& input) {
  const std::vector<int64_t> pads = call.integers("pad");
  if (pads.size() % 2 || pads.size() > 2 * static_cast<size_t>(input.sizes.rank))
    call.wrong("pad", "two integers a dimension", text(pads.size(), " integers"));
  for (int64_t n : pads)
    if (n < 0 || n > 1 << 20) call.wrong("pad", "in [0, 1048576]", text(n));
  return pads;
}

Value infer_pad(const Call& call) {
  Type x = call.real("self");
  if (std::strcmp(call.node.op->name, "aten.pad.default") == 0 &&
      call.arg("mode").name != "constant")
    call.wrong("mode", "constant", call.arg("mode").name);
  const std::vector<int64_t> pads = pads_of(call, x);
  for (size_t i = 0; i < pads.size(); ++i) {
    int64_t& n = x.sizes[x.sizes.rank - 1 - static_cast<int>(i / 2)];
    n = plus(n, pads[i]);
  }
  return of(x);
}

Value infer_same(const Call& call) { return of(call.real("self")); }

Value infer_gelu(const Call& call) {
  const Arg& how = call.arg("approximate");  // left out, of no kind
  if (how.kind == Arg::kName && how.name != "none" && how.name != "tanh")
    call.wrong("approximate", "none or tanh", how.name);
  return infer_same(call);
}

Value infer_prelu(const Call& call) {
  const Type& x = call.real("self");
  const Type& w = call.real("weight");
  const int64_t channels = x.sizes.rank > 1 ? x.sizes[1] : 1;
  if (!call.constant("weight") || (w.sizes.count() != 1 && w.sizes != Sizes{channels}))
    call.wrong("weight", text("a constant of shape (1,) or (", channels, ",)"), text_of(w));
  if (w.sizes.count() != 1 && x.sizes.rank != 2 && x.sizes.rank != 4)
    call.wrong("self", "of 2 or 4 dimensions", text_of(x));
  return of(x);
}

Sizes broadcast(const Call& call, const Type& a, const Type& b) {
  Sizes out = a.sizes.rank > b.sizes.rank ? a.sizes : b.sizes;
  for (int i = 1; i <= std::min(a.sizes.rank, b.sizes.rank); ++i) {
    const int64_t m = a.sizes[a.sizes.rank - i], n = b.sizes[b.sizes.rank - i];
    if (m != n && m != 1 && n != 1) call.wrong("other", "of sizes as " + text_of(a), text_of(b));
    out[out.rank - i] = m == 1 ? n : m;
  }
  return out;
}

Value infer_binary(const Call& call) {
  const Type& a = call.real("self");
  if (!call.is_tensor("other")) {
    call.number("other");
    return of(a);
  }
  const Type& b = call.real("other");
  return of({Element::kFloat32, broadcast(call, a, b)});
}

Value infer_compare(const Call& call) {
  call.number("other");
  return of({Element::kBool, call.real("self").sizes});
}

Value infer_and(const Call& call) {
  const Type &a = call.tensor("self"), &b = call.tensor("other");
  if (a.element != Element::kBool) call.wrong("self", "bool", text_of(a));
  if (b.element != Element::kBool) call.wrong("other", "bool", text_of(b));
  return of({Element::kBool, broadcast(call, a, b)});
}

Value infer_where(const Call& call) {
  const Type &c = call.tensor("condition"), &x = call.real("self");
  if (c.element != Element::kBool) call.wrong("condition", "bool", text_of(c));
  if (c.sizes != x.sizes) call.wrong("condition", "of shape " + text_of(x.sizes), text_of(c));
  return of(x);
}

}  // namespace bitkernels::network
