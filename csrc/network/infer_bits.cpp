// Shapes of the operators on words.
#include <utility>

#include "cpu/kernels.h"
#include "infer.h"

namespace bitkernels::network {
namespace {

const Type& words_of(const Call& call, const char* name, int64_t channels, int rank) {
  const Type& t = call.tensor(name);
  if (t.element != Element::kInt32 || (rank ? t.sizes.rank != rank : t.sizes.rank < 1) ||
      t.sizes.back() != ceil_div(channels, 32))
    call.wrong(name,
               text("int32 words", rank ? text(" of ", rank, " dimensions") : std::string(), ", ",
                    ceil_div(channels, 32), " wide for ", channels, " channels"),
               text_of(t));
  return t;
}

// Vectors, residual and types of an epilogue on an output of these sizes.
void check_epilogue(const Call& call, const Sizes& out, int64_t cout) {
  for (const char* name : {"scale", "bias", "shift_in", "slope", "shift_out", "sign_shift"}) {
    bool known = false;
    for (const Param& p : call.node.op->params) known |= p.name == name;
    if (!known || !call.given(name)) continue;
    const Type& t = call.real(name);
    if (t.sizes != Sizes{cout} || !call.constant(name))
      call.wrong(name, text("a constant, float32 of shape (", cout, ",)"), text_of(t));
  }
  const std::string op = call.node.op->name;
  if (op.find("conv_transpose") != std::string::npos) return;
  for (const char* name : {"clamp_min", "clamp_max"})
    if (call.given(name) && call.number(name) != call.number(name))
      call.wrong(name, "a number", "nan");
  if (!call.given("slope") && (call.given("shift_in") || call.given("shift_out")))
    call.wrong("slope", "given with shift_in or shift_out", "None");
  if (call.given("residual") && call.real("residual").sizes != out)
    call.wrong("residual", text("of shape ", text_of(out)), text_of(call.tensor("residual")));
  const bool packed = is_overload(call, "packed");
  if (packed && call.given("threshold")) {
    const Type& t = call.tensor("threshold");
    if (t.element != Element::kInt32 || t.sizes != Sizes{2, cout} || !call.constant("threshold"))
      call.wrong("threshold", text("a constant, int32 of shape (2, ", cout, ")"), text_of(t));
    for (const char* name :
         {"clamp_min", "clamp_max", "residual", "scale", "bias", "slope", "sign_shift"})
      if (call.given(name)) call.wrong("threshold", text("alone, without ", name), "both");
  }
}

void check_dtype(const Call& call) {
  if (call.given("dtype") && call.arg("dtype").name != "float32")
    call.wrong("dtype", "float32, the only real type of this engine", call.arg("dtype").name);
}

int64_t channels_of(const Call& call) { return call.integer("channels", 1, int64_t{1} << 31); }

// Constant filters of these dimensions, and how many.
const Type& filters_of(const Call& call, int64_t channels, int rank) {
  const Type& t = words_of(call, "weight_words", channels, rank);
  if (!call.constant("weight_words") || t.sizes.count() == 0)
    call.wrong("weight_words", "a constant of at least one word", text_of(t));
  int64_t products = channels;
  for (int i = 1; i + 1 < rank; ++i) products = times(products, t.sizes[i]);
  if (products >= int64_t{1} << 31)
    call.wrong("weight_words", "of less than 2^31 products in a sum", text(products));
  return t;
}

// (real, words) by the overload.
Value outputs(const Call& call, const Sizes& real, Sizes words, int64_t cout) {
  const bool packed = is_overload(call, "packed");
  words[words.rank - 1] = ceil_div(cout, 32);
  Value v = of({Element::kFloat32, real});
  v.second = {Element::kInt32, words};
  if (packed) v.type = v.second;
  if (!packed) check_dtype(call);
  if (is_overload(call, "both")) v.kind = Value::kTuple;
  return v;
}

// Words and filters of a convolution, that fit each other and its groups.
std::pair<const Type&, const Type&> grouped(const Call& call) {
  const int64_t channels = channels_of(call);
  const Type& words = words_of(call, "words", channels, 4);
  const int64_t groups = call.integer("groups", 1, channels);
  if (channels % groups) call.wrong("groups", text("a divisor of ", channels), text(groups));
  const Type& f = filters_of(call, channels / groups, 4);
  if (f.sizes[0] % groups) call.wrong("groups", text("a divisor of ", f.sizes[0]), text(groups));
  return {words, f};
}

}  // namespace

Value infer_sign_pack(const Call& call) {
  const Type& x = call.real("input");
  const int dim = call.dim("dim", x.sizes.rank);
  if (x.sizes.rank < 1 || x.sizes[dim] < 1)
    call.wrong("input", "at least 1 channel wide", text_of(x));
  if (call.given("shift")) {
    const Sizes& s = call.real("shift").sizes;
    Sizes each = x.sizes;
    for (int i = 1; i < each.rank; ++i) each[i] = i == dim ? each[i] : 1;
    if (s != Sizes{x.sizes[dim]} && (dim == 0 || s != each))
      call.wrong("shift", text("of shape (", x.sizes[dim], ",) or ", text_of(each)), text_of(s));
  }
  Sizes out = x.sizes;
  out.erase(dim);
  out.push(ceil_div(x.sizes[dim], 32));
  return of({Element::kInt32, out});
}

Window padded_window(const Call& call, const char* weight, int64_t height, int64_t width,
                     int64_t kh, int64_t kw) {
  const auto [sh, sw] = call.pair("stride", 1);
  const auto [dh, dw] = call.pair("dilation", 1);
  const std::vector<int64_t> p = call.integers("padding");
  if (p.size() != 1 && p.size() != 2 && p.size() != 4)
    call.wrong("padding", "one, two or four integers", text(p.size(), " of them"));
  for (int64_t n : p)
    if (n < 0 || n > 1 << 20) call.wrong("padding", "in [0, 1048576]", text(n));
  Window w = {kh, kw, sh, sw, p[0], p[0], p.back(), p.back(), dh, dw, 0, 0};
  if (p.size() == 4) w.bottom = p[1], w.left = p[2];
  const auto out = [&](int64_t size, int64_t pads, int64_t taps, int64_t stride, int64_t dilation) {
    const int64_t room = plus(size, pads) - plus(times(dilation, taps - 1), 1);
    if (room < 0)
      call.wrong(weight, "not larger than the padded input", text_of(call.tensor(weight)));
    return room / stride + 1;
  };
  w.out_h = out(height, w.top + w.bottom, kh, sh, dh);
  w.out_w = out(width, w.left + w.right, kw, sw, dw);
  return w;
}

Window packed_window(const Call& call) {
  const auto& [words, f] = grouped(call);
  if (call.given("out_channels") && call.integer("out_channels") != f.sizes[0])
    call.wrong("out_channels", text(f.sizes[0]), text(call.integer("out_channels")));
  return padded_window(call, "weight_words", words.sizes[1], words.sizes[2], f.sizes[1],
                       f.sizes[2]);
}

Value infer_packed_conv(const Call& call) {
  call.integer("pad_value", -1, 1);
  const Window w = packed_window(call);
  const Sizes& words = call.tensor("words").sizes;
  const int64_t cout = call.tensor("weight_words").sizes[0];
  const Sizes out = {words[0], cout, w.out_h, w.out_w};
  check_epilogue(call, out, cout);
  return outputs(call, out, {words[0], w.out_h, w.out_w, 0}, cout);
}

Value infer_packed_linear(const Call& call) {
  const int64_t channels = channels_of(call);
  Sizes out = words_of(call, "words", channels, 0).sizes;
  if (out.rank > 3) call.wrong("words", "of 1 to 3 dimensions", text_of(out));
  const Sizes& f = filters_of(call, channels, 2).sizes;
  if (call.given("out_channels") && call.integer("out_channels") != f[0])
    call.wrong("out_channels", text(f[0]), text(call.integer("out_channels")));
  const Sizes words = out;
  out[out.rank - 1] = f[0];
  check_epilogue(call, out, f[0]);
  return outputs(call, out, words, f[0]);
}

Value infer_packed_pool(const Call& call) {
  const Type& words = call.tensor("words");
  if (words.element != Element::kInt32 || words.sizes.rank != 4)
    call.wrong("words", "int32 words of 4 dimensions", text_of(words));
  const Window w = pool_window(call, 1);
  return of({Element::kInt32, {words.sizes[0], w.out_h, w.out_w, words.sizes[3]}});
}

Value infer_transposed(const Call& call) {
  const auto of_groups = grouped(call);
  const Type &words = of_groups.first, &f = of_groups.second;
  const auto stride = call.pair("stride", 1), dilation = call.pair("dilation", 1);
  const auto padding = call.pair("padding", 0), more = call.pair("output_padding", 0);
  const auto out = [&](int64_t size, int64_t taps, int64_t s, int64_t d, int64_t p, int64_t extra) {
    if (size < 1) call.wrong("words", "at least 1 x 1 in size", text_of(words));
    if (extra >= std::max(s, d))
      call.wrong("output_padding", "smaller than stride or dilation", text(extra));
    const int64_t n = plus(times(size - 1, s), times(d, taps - 1)) + 1 + extra - 2 * p;
    if (n < 1) call.wrong("padding", "small enough for an output of at least 1 x 1", text(p));
    return n;
  };
  const Sizes sizes = {
      words.sizes[0], f.sizes[0],
      out(words.sizes[1], f.sizes[1], stride.first, dilation.first, padding.first, more.first),
      out(words.sizes[2], f.sizes[2], stride.second, dilation.second, padding.second, more.second)};
  check_dtype(call);
  check_epilogue(call, sizes, f.sizes[0]);
  return of({Element::kFloat32, sizes});
}

Value infer_rprelu(const Call& call) {
  const Type& x = call.real("input");
  if (x.sizes.rank != 2 && x.sizes.rank != 4)
    call.wrong("input", "of 2 or 4 dimensions", text_of(x));
  for (const char* name : {"shift_in", "slope", "shift_out"})
    if (call.real(name).sizes != Sizes{x.sizes[1]} || !call.constant(name))
      call.wrong(name, text("a constant of shape (", x.sizes[1], ",)"), text_of(call.real(name)));
  return of({Element::kFloat32, x.sizes});
}

Value infer_rsign(const Call& call) {
  const Type& x = call.real("input");
  if (x.sizes.rank != 2 && x.sizes.rank != 4)
    call.wrong("input", "of 2 or 4 dimensions", text_of(x));
  if (call.real("shift").sizes != Sizes{x.sizes[1]} || !call.constant("shift"))
    call.wrong("shift", text("a constant of shape (", x.sizes[1], ",)"),
               text_of(call.real("shift")));
  return of({Element::kFloat32, x.sizes});
}

Value infer_unpack(const Call& call) {
  const int64_t channels = channels_of(call);
  Sizes out = words_of(call, "words", channels, 0).sizes;
  const int dim = call.dim("dim", out.rank);
  check_dtype(call);
  out.erase(out.rank - 1);
  out.insert(dim, channels);
  return of({Element::kFloat32, out});
}

}  // namespace bitkernels::network
