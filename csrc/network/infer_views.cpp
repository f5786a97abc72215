// Shapes of the operators that move values or look at them differently, and arithmetic on sizes.
#include <cstring>

#include "infer.h"

namespace bitkernels::network {
Value infer_cat(const Call& call) {
  const Arg& list = call.arg("tensors");
  Type out = call.type_of(list.items[0], "tensors");
  const int dim = call.dim("dim", out.sizes.rank);
  if (out.sizes.rank < 1) call.wrong("tensors", "of at least 1 dimension", text_of(out));
  for (size_t i = 1; i < list.items.size(); ++i) {
    Type next = call.type_of(list.items[i], "tensors");
    if (next.sizes.rank != out.sizes.rank) call.wrong("tensors", "of one rank", text_of(next));
    const int64_t size = plus(out.sizes[dim], next.sizes[dim]);
    next.sizes[dim] = out.sizes[dim];
    if (!(next == out)) call.wrong("tensors", "alike but for dim", text_of(next));
    out.sizes[dim] = size;
  }
  return of(out);
}

std::pair<int64_t, int64_t> slice_of(const Call& call, const Type& input) {
  const int64_t size = input.sizes[call.dim("dim", input.sizes.rank)];
  const auto bound = [&](const char* name, int64_t fallback) {
    int64_t n = call.given(name) ? call.integer(name) : fallback;
    if (n < 0) n += size;
    return std::clamp<int64_t>(n, 0, size);
  };
  const int64_t start = bound("start", 0), end = bound("end", size);
  const int64_t step = call.integer("step", 1, int64_t{1} << 40);
  return {start, end <= start ? 0 : (end - start - 1) / step + 1};
}

Value infer_slice(const Call& call) {
  Type x = call.tensor("self");
  if (x.sizes.rank < 1) call.wrong("self", "of at least 1 dimension", text_of(x));
  x.sizes[call.dim("dim", x.sizes.rank)] = slice_of(call, x).second;
  return of(x);
}

Value infer_flatten(const Call& call) {
  Type x = call.tensor("self");
  const int first = call.dim("start_dim", x.sizes.rank), last = call.dim("end_dim", x.sizes.rank);
  if (first > last) call.wrong("start_dim", "at most end_dim", text(first));
  if (x.sizes.rank == 0) x.sizes.push(1);
  for (int i = first; i < last; ++i) {
    x.sizes[first] = times(x.sizes[first], x.sizes[first + 1]);
    x.sizes.erase(first + 1);
  }
  return of(x);
}

Value infer_reshape(const Call& call) {
  const Type& x = call.tensor("self");
  Type out = {x.element, {}};
  int free = -1;
  int64_t known = 1;
  for (int64_t n : call.integers("shape")) {
    if (n < -1 || (n == -1 && free >= 0)) call.wrong("shape", "sizes, one of them -1", text(n));
    if (n == -1) free = out.sizes.rank;
    if (n >= 0) known = times(known, n);
    out.sizes.push(n);
  }
  const int64_t count = x.sizes.count();
  if (free >= 0 && known > 0 && count % known == 0) out.sizes[free] = count / known;
  if ((free >= 0 && out.sizes[free] < 0) || out.sizes.count() != count)
    call.wrong("shape", text("of ", count, " elements"), text_of(out.sizes));
  return of(out);
}

Value infer_permute(const Call& call) {
  const Type& x = call.tensor("self");
  const std::vector<int64_t> dims = call.integers("dims");
  Type out = {x.element, {}};
  unsigned seen = 0;
  for (int64_t d : dims) {
    const int dim = call.dim_of("dims", d, x.sizes.rank);
    seen |= 1u << dim;
    out.sizes.push(x.sizes.rank ? x.sizes[dim] : 1);
  }
  if (dims.size() != static_cast<size_t>(x.sizes.rank) || seen != (1u << x.sizes.rank) - 1)
    call.wrong("dims", text("each of ", x.sizes.rank, " dimensions once"), text_of(out.sizes));
  return of(out);
}

Value infer_transpose(const Call& call) {
  Type x = call.tensor("self");
  if (x.sizes.rank)
    std::swap(x.sizes[call.dim("dim0", x.sizes.rank)], x.sizes[call.dim("dim1", x.sizes.rank)]);
  return of(x);
}

Value infer_unsqueeze(const Call& call) {
  Type x = call.tensor("self");
  x.sizes.insert(call.dim("dim", x.sizes.rank + 1), 1);
  return of(x);
}

Value infer_squeeze(const Call& call) {
  Type x = call.tensor("self");
  const bool all = std::strcmp(call.node.op->name, "aten.squeeze.default") == 0;
  unsigned chosen = all ? ~0u : 0;
  if (!all)
    for (int64_t d : call.integers("dim")) chosen |= 1u << call.dim_of("dim", d, x.sizes.rank);
  for (int i = x.sizes.rank - 1; i >= 0; --i)
    if (chosen >> i & 1 && x.sizes[i] == 1) x.sizes.erase(i);
  return of(x);
}

Value infer_copy(const Call& call) {
  const Type& x = call.tensor("self");
  if (std::strcmp(call.node.op->name, "aten.to.dtype") == 0 &&
      call.arg("dtype").name != name_of(x.element))
    call.wrong("dtype", text(name_of(x.element), ": this engine casts nothing"),
               call.arg("dtype").name);
  return of(x);
}

Value infer_size(const Call& call) {
  const Type& x = call.tensor("self");
  Value v;
  v.kind = Value::kInt;
  if (x.sizes.rank < 1) call.wrong("self", "of at least 1 dimension", text_of(x));
  v.integer = x.sizes[call.dim("dim", x.sizes.rank)];
  return v;
}

Value infer_getitem(const Call& call) {
  const Value& pair = call.values[static_cast<size_t>(call.source("self"))];
  if (pair.kind != Value::kTuple) call.wrong("self", "a pair", "a tensor or a number");
  const int64_t index = call.integer("index", 0, 1);
  return of(index == 0 ? pair.type : pair.second);
}

Value infer_integer(const Call& call) {
  const int64_t a = call.integer("a"), b = call.integer("b");
  const std::string name = call.node.op->name;
  Value v;
  v.kind = Value::kInt;
  if (name == "size.add") {
    v.integer = plus(a, b);
  } else if (name == "size.sub") {
    if (__builtin_sub_overflow(a, b, &v.integer)) call.wrong("b", "smaller", text(b));
  } else if (name == "size.mul") {
    v.integer = times(a, b);
  } else {
    if (b == 0 || (b == -1 && a < -INT64_MAX)) call.wrong("b", "another number", text(b));
    const int64_t quotient = a / b - (a % b != 0 && (a < 0) != (b < 0));
    v.integer = name == "size.floordiv" ? quotient : a - quotient * b;
  }
  return v;
}

}  // namespace bitkernels::network
