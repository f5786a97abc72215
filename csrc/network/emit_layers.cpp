// Steps of real layers and pools.
#include <cstring>

#include "cpu/conv2d.h"
#include "cpu/int8_conv2d.h"
#include "cpu/pool2d.h"
#include "emit.h"
#include "strided.h"

namespace bitkernels::network {
namespace {

RealConv conv_of(const Call& call, const Window& w, const View& x) {
  const Sizes& f = call.tensor("weight").sizes;
  RealConv c = {};
  c.batch = x.sizes[0], c.height = x.sizes[2], c.width = x.sizes[3];
  c.groups = call.integer("groups");
  c.channels = f[1], c.out_channels = f[0] / c.groups;
  c.kh = w.kh, c.kw = w.kw, c.stride_h = w.stride_h, c.stride_w = w.stride_w;
  c.top = w.top, c.left = w.left, c.dilation_h = w.dilation_h, c.dilation_w = w.dilation_w;
  c.out_h = w.out_h, c.out_w = w.out_w;
  return c;
}

RealConv linear_of(const Call& call, const View& x) {
  const Sizes& f = call.tensor("weight").sizes;
  RealConv c = {};  // an image of one row
  c.batch = c.height = c.out_h = 1;
  c.width = c.out_w = x.sizes.count() / f[1];
  c.groups = c.kh = c.kw = c.stride_h = c.stride_w = c.dilation_h = c.dilation_w = 1;
  c.channels = f[1], c.out_channels = f[0];
  return c;
}

// What is left of a layer whose sizes are filled in; `node` writes, `call` is the layer's.
void fill(Lowering& low, const Call& call, int node, RealConv& conv, const View& x,
          const View& out) {
  conv.in_pixel = rows_of(x)->row;
  conv.out_pixel = rows_of(out)->row;
  conv.lo = low.chain(node).lo;
  conv.hi = low.chain(node).hi;
  if (call.given("bias")) conv.bias = low.constants.floats(low.resolved(call, "bias").node);
}

int layer_of(const Lowering& low, const Call& call) {
  return static_cast<int>(&call.node - low.graph.nodes.data());
}

void emit_product(Lowering& low, const Call& call, int node, RealConv conv, const View& x) {
  const int layer = layer_of(low, call), weight = low.resolved(call, "weight").node;
  const Kernel* kernel = &low.kernel;
  const View out = low.out(node);
  fill(low, call, node, conv, x, out);
  conv.weight = static_cast<const float*>(
      low.constants.made(layer, "arranged", arranged_conv2d_size(*kernel, conv) * 4, [&](void* to) {
        const Memory dense = low.constants.weight(weight);
        arrange_conv2d(*kernel, conv, reinterpret_cast<const float*>(dense.get()),
                       static_cast<float*>(to));
      }));
  const Where in = x.where, to = out.where;
  low.step(
      node, {x}, {out},
      [=](const Frame& f) {
        RealConv c = conv;
        c.input = f.at<const float>(in);
        c.out = f.at<float>(to);
        conv2d(*kernel, c);
      },
      weight);
}

// The same in int8; the rounded input has memory of its own.
void emit_int8_product(Lowering& low, const Call& call, int node, const RealConv& sizes,
                       const View& x) {
  const int layer = layer_of(low, call), weight = low.resolved(call, "weight").node;
  const Int8Dot* dot = &int8_dot(low.kernel);
  const View out = low.out(node);
  Int8Conv conv = {};
  conv.layer = sizes;
  fill(low, call, node, conv.layer, x, out);
  conv.steps = static_cast<float>(call.number("steps"));
  conv.scale = low.constants.floats(low.resolved(call, "scale").node);
  conv.weight = static_cast<const int32_t*>(
      low.constants.made(layer, "arranged", arranged_int8_size(*dot, sizes) * 4, [&](void* to) {
        const Memory dense = low.constants.weight(weight);
        arrange_int8_conv2d(*dot, sizes, reinterpret_cast<const int8_t*>(dense.get()),
                            static_cast<int32_t*>(to));
      }));
  const View rounded = low.fresh({Element::kInt32, {int8_input_size(*dot, sizes)}}, {1});
  const Where in = x.where, to = out.where, between = rounded.where;
  low.step(
      node, {x}, {out, rounded},
      [=](const Frame& f) {
        Int8Conv c = conv;
        c.layer.input = f.at<const float>(in);
        c.layer.out = f.at<float>(to);
        c.quantized = f.at<int32_t>(between);
        int8_conv2d(*dot, c);
      },
      weight);
}

RealPool pool_of(const View& x, const View& out) {
  RealPool p = {};
  p.batch = x.sizes[0], p.channels = x.sizes[1], p.height = x.sizes[2], p.width = x.sizes[3];
  p.in_pixel = rows_of(x)->row;
  p.out_pixel = rows_of(out)->row;
  p.dilation_h = p.dilation_w = 1;
  return p;
}

RealPool pool_of(const View& x, const View& out, const Window& w) {
  RealPool p = pool_of(x, out);
  p.kh = w.kh, p.kw = w.kw, p.stride_h = w.stride_h, p.stride_w = w.stride_w;
  p.top = w.top, p.bottom = w.bottom, p.left = w.left, p.right = w.right;
  p.dilation_h = w.dilation_h, p.dilation_w = w.dilation_w;
  p.out_h = w.out_h, p.out_w = w.out_w;
  return p;
}

template <class F>
void pool_step(Lowering& low, int node, const View& x, const View& out, const RealPool& pool,
               const F& run) {
  const Where in = x.where, to = out.where;
  low.step(node, {x}, {out}, [=](const Frame& f) {
    RealPool p = pool;
    p.input = f.at<const float>(in);
    p.out = f.at<float>(to);
    run(p);
  });
}

}  // namespace

void emit_conv(Lowering& low, const Call& call, int node) {
  const int layer = low.chain(node).conv;
  const View x = low.rows(low.source(layer));
  emit_product(low, call, node, conv_of(call, conv_window(call, low.pads(layer)), x), x);
}

void emit_int8_conv(Lowering& low, const Call& call, int node) {
  const int layer = low.chain(node).conv;
  const View x = low.rows(low.source(layer));
  emit_int8_product(low, call, node, conv_of(call, int8_window(call, low.pads(layer)), x), x);
}

void emit_linear(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.resolved(call, "input"));
  emit_product(low, call, node, linear_of(call, x), x);
}

void emit_int8_linear(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.resolved(call, "input"));
  emit_int8_product(low, call, node, linear_of(call, x), x);
}

void emit_max_pool(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.source(node)), out = low.out(node);
  const Kernel* kernel = &low.kernel;
  pool_step(low, node, x, out, pool_of(x, out, pool_window(call, 2, low.pads(node))),
            [=](const RealPool& p) { max_pool2d(*kernel, p); });
}

void emit_avg_pool(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.source(node)), out = low.out(node);
  const bool count = call.flag("count_include_pad") || low.pads(node).any();
  const int64_t divisor = call.given("divisor_override") ? call.integer("divisor_override") : 0;
  const Kernel* kernel = &low.kernel;
  pool_step(low, node, x, out, pool_of(x, out, pool_window(call, 2, low.pads(node))),
            [=](const RealPool& p) { avg_pool2d(*kernel, p, count, divisor); });
}

void emit_adaptive_pool(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.resolved(call, "self")), out = low.out(node);
  RealPool p = pool_of(x, out);
  p.out_h = out.sizes[2], p.out_w = out.sizes[3];
  const Kernel* kernel = &low.kernel;
  pool_step(low, node, x, out, p, [=](const RealPool& q) { adaptive_avg_pool2d(*kernel, q); });
}

void emit_mean(Lowering& low, const Call& call, int node) {
  const Ref ref = low.resolved(call, "self");
  const Type& t = low.type(ref);
  const std::vector<int> dims = reduced_dims(call, t);
  const View out = low.out(node);
  const Kernel* kernel = &low.kernel;
  if (t.sizes.rank == 4 && dims == std::vector<int>{2, 3}) {
    const View x = low.rows(ref);
    RealPool p = pool_of(x, x);
    p.out_h = p.out_w = 1;
    p.out_pixel = out.strides[0];
    if (out.sizes[0] == 1) p.out_pixel = x.sizes[1];
    return pool_step(low, node, x, out, p,
                     [=](const RealPool& q) { adaptive_avg_pool2d(*kernel, q); });
  }
  // Any other: a sum for each output, over the rest.
  const View x = low.view(ref);
  View each = out;  // of the output's elements, where each begins in the input
  Sizes left, steps;
  each.strides = {};
  for (int i = 0; i < t.sizes.rank; ++i) {
    const bool reduced = std::find(dims.begin(), dims.end(), i) != dims.end();
    if (reduced) left.push(x.sizes[i]), steps.push(x.strides[i]);
    if (reduced && out.sizes.rank != t.sizes.rank) continue;
    each.strides.push(reduced ? 0 : x.strides[i]);
  }
  const Strided order = strided(out, each, each);
  const int64_t count = left.count();
  const Where in = x.where, to = out.where;
  low.step(node, {x}, {out}, [=](const Frame& f) {
    const auto sum = [&](const float& first, float) {
      double total = 0;
      for (int64_t i = 0; i < count; ++i) {
        int64_t at = 0, rest = i;
        for (int d = left.rank - 1; d >= 0; --d) at += rest % left[d] * steps[d], rest /= left[d];
        total += (&first)[at];
      }
      return static_cast<float>(total / static_cast<double>(count));
    };
    for_each(order, f.at<float>(to), f.at<const float>(in), f.at<const float>(in), sum);
  });
}

}  // namespace bitkernels::network
