// Views cost nothing where strides can say them; else a copy. Padding and concatenation.
#include <algorithm>
#include <cstring>

#include "emit.h"
#include "strided.h"

namespace bitkernels::network {
namespace {

// A view of other sizes on the same elements in the same order, where strides can say it.
std::optional<View> reshaped(const View& x, const Sizes& sizes) {
  View v = x;
  v.sizes = sizes;
  v.strides = sizes;
  if (x.sizes.count() == 0) {
    v.strides = dense_strides(v);
    return v;
  }
  // Runs of dimensions, of equal products in both, each with one step.
  int i = x.sizes.rank - 1, j = sizes.rank - 1;
  while (i >= 0 || j >= 0) {
    int64_t in = 1, out = 1, step = 1, reach = 0;
    bool first = true;
    while (j >= 0 && out == in && sizes[j] == 1) v.strides[j--] = 1;
    while (i >= 0 && in == out && x.sizes[i] == 1) --i;
    if (i < 0 && j < 0) break;
    do {
      if (in <= out && i >= 0) {
        if (x.sizes[i] != 1) {
          if (first) step = x.strides[i];
          if (!first && x.strides[i] != reach) return std::nullopt;
          first = false;
          reach = x.strides[i] * x.sizes[i];
          in *= x.sizes[i];
        }
        --i;
      } else if (j >= 0) {
        v.strides[j] = step * out;
        out *= sizes[j--];
      } else {
        return std::nullopt;
      }
    } while (in != out);
  }
  return v;
}

}  // namespace

void emit_view(Lowering& low, const Call& call, int node) {
  const Ref ref = low.resolved(call, "self");
  const View x = low.view(ref);
  const Type& t = low.type({node, 0});
  const std::string op = call.node.op->name;
  View v = x;
  v.sizes = t.sizes;
  if (op == "aten.slice.Tensor") {
    const int dim = call.dim("dim", x.sizes.rank);
    v.where.offset += slice_of(call, x).first * x.strides[dim] * bytes_of(x.element);
    // A step past the end leaves one element, whatever its stride.
    v.strides[dim] = x.strides[dim] * std::min(call.integer("step"), x.sizes[dim]);
  } else if (op == "aten.permute.default") {
    const std::vector<int64_t> dims = call.integers("dims");
    for (size_t i = 0; i < dims.size() && x.sizes.rank > 0; ++i)
      v.strides[static_cast<int>(i)] = x.strides[call.dim_of("dims", dims[i], x.sizes.rank)];
  } else if (op == "aten.transpose.int") {
    if (x.sizes.rank)
      std::swap(v.strides[call.dim("dim0", x.sizes.rank)],
                v.strides[call.dim("dim1", x.sizes.rank)]);
  } else if (const std::optional<View> same = reshaped(x, t.sizes)) {
    v = *same;
  } else {
    // In PyTorch's order of elements, the last dimension innermost.
    const Type plain = {Element::kInt64, x.sizes};
    const View copy = low.copied(x, low.fresh(x, dense_strides(plain)), node);
    const std::optional<View> again = reshaped(copy, t.sizes);
    if (!again) fail(quoted(call.node.name), " cannot be seen as ", text_of(t));
    v = *again;
  }
  low.give(node, v);
}

void emit_pad(Lowering& low, const Call& call, int node) {
  const View x = low.view(low.resolved(call, "self")), out = low.out(node);
  const std::vector<int64_t> pads = pads_of(call, x);
  const auto value = static_cast<float>(call.given("value") ? call.number("value") : 0);
  View inside = out;
  inside.sizes = x.sizes;
  for (size_t i = 0; i < pads.size(); i += 2)
    inside.where.offset += pads[i] * out.strides[x.sizes.rank - 1 - static_cast<int>(i / 2)] * 4;
  const Strided all = strided(out, out, out);
  const Where to = out.where;
  low.step(node, {}, {out}, [=](const Frame& f) {
    const float* any = f.at<const float>(to);
    for_each(all, f.at<float>(to), any, any, [value](float, float) { return value; });
  });
  low.copied(x, inside, node);
}

void emit_cat(Lowering& low, const Call& call, int node) {
  const View out = low.out(node);
  const int dim = call.dim("dim", out.sizes.rank);
  int64_t first = 0;
  for (const Arg& arg : call.arg("tensors").items) {
    const View part = low.view(low.resolved(arg));
    View place = out;
    place.sizes[dim] = part.sizes[dim];
    place.where.offset += first * out.strides[dim] * bytes_of(out.element);
    first += part.sizes[dim];
    const bool there = part.where.buffer == place.where.buffer &&
                       part.where.offset == place.where.offset && part.strides == place.strides;
    if (!there) low.copied(part, place, node);
  }
}

}  // namespace bitkernels::network
