// Shapes of layers in int8.
#include <cmath>
#include <limits>

#include "cpu/int8_conv2d.h"
#include "infer.h"

namespace bitkernels::network {
namespace {

// Output channels, everything but the geometry checked.
int64_t check_layer(const Call& call, int rank) {
  const Type& weight = call.tensor("weight");
  if (weight.element != Element::kInt8 || weight.sizes.rank != rank || !call.constant("weight") ||
      weight.sizes.count() == 0)
    call.wrong("weight", text("a constant, int8 of ", rank, " dimensions, that is not empty"),
               text_of(weight));
  const int64_t products = weight.sizes.count() / weight.sizes[0];
  if (products > kMostInt8Products)
    call.wrong("weight", text("of at most ", kMostInt8Products, " products a sum"), text(products));
  for (const char* name : {"scale", "bias"})
    if (call.given(name) &&
        (call.real(name).sizes != Sizes{weight.sizes[0]} || !call.constant(name)))
      call.wrong(name, text("a constant of shape (", weight.sizes[0], ",)"),
                 text_of(call.tensor(name)));
  const double steps = call.number("steps");
  using Limits = std::numeric_limits<float>;
  if (!(steps >= static_cast<double>(Limits::min()) && steps <= static_cast<double>(Limits::max())))
    call.wrong("steps", "a positive float32 number", text(steps));
  return weight.sizes[0];
}

}  // namespace

Window int8_window(const Call& call, const Pads& pads) {
  const Sizes &x = call.tensor("input").sizes, &f = call.tensor("weight").sizes;
  Window w = padded_window(call, "weight", x[2], x[3], f[2], f[3]);
  // The sizes of `input` hold a fused pad already.
  w.top += pads.top, w.bottom += pads.bottom, w.left += pads.left, w.right += pads.right;
  return w;
}

Value infer_int8_conv(const Call& call) {
  const Sizes& x = call.real("input", 4).sizes;
  const int64_t cout = check_layer(call, 4);
  const Type& weight = call.tensor("weight");
  const int64_t groups = call.integer("groups", 1, cout);
  if (cout % groups || times(weight.sizes[1], groups) != x[1])
    call.wrong("weight", text("of ", groups, " groups for ", x[1], " channels"), text_of(weight));
  const Window w = int8_window(call);
  return of({Element::kFloat32, {x[0], cout, w.out_h, w.out_w}});
}

Value infer_int8_linear(const Call& call) {
  Sizes out = call.real("input").sizes;
  const int64_t cout = check_layer(call, 2);
  const int64_t in = call.tensor("weight").sizes[1];
  if (out.rank < 1 || out.rank > 3 || out.back() != in)
    call.wrong("input", text("of 1 to 3 dimensions, ", in, " wide"), text_of(out));
  out[out.rank - 1] = cout;
  return of({Element::kFloat32, out});
}

}  // namespace bitkernels::network
