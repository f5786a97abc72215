// Steps of the operators on words.
#include <cstring>

#include "cpu/packed_conv2d.h"
#include "cpu/packed_max_pool2d.h"
#include "cpu/sign_pack.h"
#include "cpu/tile_weight.h"
#include "cpu/unpack.h"
#include "emit.h"
#include "phases.h"
#include "strided.h"

namespace bitkernels::network {
namespace {

const float* vector_of(Lowering& low, const Call& call, const char* name) {
  return call.given(name) ? low.constants.floats(low.resolved(call, name).node) : nullptr;
}

bool knows(const Call& call, const char* name) {
  for (const Param& p : call.node.op->params)
    if (p.name == name) return true;
  return false;
}

// The constant part of an epilogue.
Epilogue epilogue_of(Lowering& low, const Call& call, int64_t cout) {
  Epilogue e;
  const auto number = [&](const char* name, double none) {
    return static_cast<float>(call.given(name) ? call.number(name) : none);
  };
  e.clamp = call.given("clamp_min") || call.given("clamp_max");
  e.lo = number("clamp_min", -std::numeric_limits<float>::infinity());
  e.hi = number("clamp_max", std::numeric_limits<float>::infinity());
  e.scale = vector_of(low, call, "scale");
  e.bias = vector_of(low, call, "bias");
  e.shift_in = vector_of(low, call, "shift_in");
  e.slope = vector_of(low, call, "slope");
  e.shift_out = vector_of(low, call, "shift_out");
  if (knows(call, "sign_shift")) e.sign_shift = vector_of(low, call, "sign_shift");
  if (knows(call, "threshold") && call.given("threshold")) {
    const int node = low.resolved(call, "threshold").node;
    e.t_lo = static_cast<const int32_t*>(
        low.constants.made(node, "threshold", (2 * cout + 32) * 4, [&](void* to) {
          const auto* from = static_cast<const int32_t*>(low.constants.raw(node));
          std::copy(from, from + cout, static_cast<int32_t*>(to));
          std::copy(from + cout, from + 2 * cout, static_cast<int32_t*>(to) + cout + 32);
        }));
    e.t_hi = e.t_lo + cout + 32;
  }
  return e;
}

const uint32_t* tiles_of(Lowering& low, int weight, const Sizes& sizes, int64_t groups) {
  const int64_t cout = sizes[0], taps = sizes.count() / cout;
  const int64_t bytes = groups * ceil_div(cout / groups, kTile) * kTile * taps * 4;
  return static_cast<const uint32_t*>(
      low.constants.made(weight, text("tiles", groups).c_str(), bytes, [&](void* to) {
        const Memory words = low.constants.weight(weight);
        tile_weight(reinterpret_cast<const uint32_t*>(words.get()), groups, cout / groups, taps,
                    static_cast<uint32_t*>(to));
      }));
}

// Strides as the kernels take them; those of a matrix are of an image of one row.
Strides strides_of(const View& v) {
  if (v.sizes.rank == 4) return {v.strides[0], v.strides[1], v.strides[2], v.strides[3]};
  return {0, 1, 0, rows_of(v)->row};
}

// The steps that packed_conv2d and packed_linear share.
void emit_product(Lowering& low, const Call& call, int node, const Conv& conv, const View& words) {
  const bool both = is_overload(call, "both");
  const bool packed = is_overload(call, "packed");
  Epilogue epilogue = epilogue_of(low, call, conv.groups * conv.out_channels);
  std::vector<View> reads = {words}, writes;
  Where out, signs, residual;
  int in_place = -1;
  Strides out_strides = {}, residual_strides = {};
  if (!packed) {
    writes.push_back(low.out(node));
    out = writes.back().where;
    out_strides = strides_of(writes.back());
  }
  if (packed || both) {
    const int index = both ? 1 : 0;
    const View v = low.out(node, index);
    writes.push_back(v);
    signs = v.where;
  }
  if (call.given("residual")) {
    const Ref repeated = low.repeated(node);
    const Ref ref = repeated.node >= 0 ? repeated : low.resolved(call, "residual");
    if (repeated.node >= 0)
      epilogue.residual_repeats = low.type(ref).sizes[channel_dim(low.type(ref))];
    reads.push_back(low.type(ref).sizes.rank == 4 ? low.view(ref) : low.rows(ref));
    residual = reads.back().where;
    residual_strides = strides_of(reads.back());
    // An element of the output needs its own of the residual alone.
    if (!packed && repeated.node < 0) in_place = static_cast<int>(reads.size()) - 1;
  }
  const Where in = words.where;
  const Kernel* kernel = &low.kernel;
  low.step(
      node, reads, writes,
      [=](const Frame& f) {
        Conv c = conv;
        Epilogue e = epilogue;
        c.input = f.at<const uint32_t>(in);
        if (out.buffer >= 0) {
          e.out = f.at<float>(out);
          e.out_channel = out_strides.c;
        }
        if (signs.buffer >= 0) e.words = f.at<uint32_t>(signs);
        if (residual.buffer >= 0) {
          e.residual = f.at<const float>(residual);
          e.residual_channel = residual_strides.c;
        }
        packed_conv2d(*kernel, c, e, out_strides, residual_strides);
      },
      low.resolved(call, "weight_words").node, in_place);
}

}  // namespace

void emit_sign_pack(Lowering& low, const Call& call, int node) {
  const Type& t = call.tensor("input");
  const int dim = call.dim("dim", t.sizes.rank);
  const int64_t channels = t.sizes[dim];
  View x = low.view(low.resolved(call, "input"));
  // Rows along `dim`, the other dimensions in their order.
  View order = x;
  order.element = Element::kInt32;  // whose memory has the last dimension innermost
  order.sizes.erase(dim), order.strides.erase(dim);
  order.sizes.push(x.sizes[dim]), order.strides.push(x.strides[dim]);
  if (!rows_of(order)) {
    View fresh = low.fresh(order, dense_strides(order));
    order = low.copied(order, fresh, node);
  }
  const Rows rows = *rows_of(order);
  std::vector<View> reads = {order};
  int64_t samples = 1;
  if (call.given("shift")) {
    const Ref ref = low.resolved(call, "shift");
    View s = low.dense(ref);
    if (s.sizes.rank > 1) samples = std::max<int64_t>(t.sizes[0], 1);
    // It is read past its end, where an input or output of the caller may end.
    if (!low.graph.nodes[static_cast<size_t>(ref.node)].tensor)
      s = low.copied(s, low.fresh(s, dense_strides(s)), node);
    reads.push_back(s);
  }
  const View out = low.out(node);
  const Where in = order.where, to = out.where,
              shift = call.given("shift") ? reads[1].where : Where();
  const Kernel* kernel = &low.kernel;
  if (rows.row == channels) {
    low.step(node, reads, {out}, [=](const Frame& f) {
      sign_pack(*kernel, f.at<const float>(in), DType::kF32, rows.count, channels, 1,
                shift.buffer < 0 ? nullptr : f.at<const float>(shift), samples, 0,
                f.at<uint32_t>(to), nullptr);
    });
    return;
  }
  const int64_t words = ceil_div(channels, 32), each = std::max<int64_t>(rows.count / samples, 1);
  low.step(node, reads, {out}, [=](const Frame& f) {
    const auto* x = f.at<const float>(in);
    const auto* s = shift.buffer < 0 ? nullptr : f.at<const float>(shift);
    auto* y = f.at<uint32_t>(to);
    parallel_for(rows.count, 1 + (1 << 15) / channels, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        kernel->pack_rows(x + r * rows.row, DType::kF32, 1, channels,
                          s ? s + (samples > 1 ? r / each * channels : 0) : nullptr, 0,
                          y + r * words, nullptr);
    });
  });
}

void emit_packed_conv(Lowering& low, const Call& call, int node) {
  const Window w = packed_window(call);
  const View words = low.dense(low.resolved(call, "words"));
  const Sizes& f = call.tensor("weight_words").sizes;
  const int64_t groups = call.integer("groups");
  const Conv conv = {words.sizes[0],
                     words.sizes[1],
                     words.sizes[2],
                     groups,
                     call.integer("channels") / groups,
                     f[0] / groups,
                     w.kh,
                     w.kw,
                     w.stride_h,
                     w.stride_w,
                     w.top,
                     w.bottom,
                     w.left,
                     w.right,
                     w.dilation_h,
                     w.dilation_w,
                     w.out_h,
                     w.out_w,
                     static_cast<int>(call.integer("pad_value")),
                     nullptr,
                     tiles_of(low, low.resolved(call, "weight_words").node, f, groups)};
  emit_product(low, call, node, conv, words);
}

void emit_packed_linear(Lowering& low, const Call& call, int node) {
  const View words = low.dense(low.resolved(call, "words"));
  const Sizes& f = call.tensor("weight_words").sizes;
  const int64_t rows = words.sizes.count() / words.sizes.back();
  const Conv conv = {1,
                     1,
                     rows,
                     1,
                     call.integer("channels"),
                     f[0],
                     1,
                     1,
                     1,
                     1,
                     0,
                     0,
                     0,
                     0,
                     1,
                     1,
                     1,
                     rows,
                     0,
                     nullptr,
                     tiles_of(low, low.resolved(call, "weight_words").node, f, 1)};
  emit_product(low, call, node, conv, words);
}

void emit_packed_pool(Lowering& low, const Call& call, int node) {
  const Window w = pool_window(call, 1);
  const View words = low.dense(low.resolved(call, "words"));
  const View out = low.out(node);
  const Pool pool = {words.sizes[0], words.sizes[1], words.sizes[2], words.sizes[3], w.kh,
                     w.kw,           w.stride_h,     w.stride_w,     w.top,          w.left,
                     w.dilation_h,   w.dilation_w,   w.out_h,        w.out_w};
  const Where in = words.where, to = out.where;
  low.step(node, {words}, {out}, [=](const Frame& f) {
    packed_max_pool2d(pool, f.at<const uint32_t>(in), f.at<uint32_t>(to));
  });
}

void emit_unpack(Lowering& low, const Call& call, int node) {
  const View words = low.dense(low.resolved(call, "words"));
  Type last = words;
  const int64_t channels = call.integer("channels");
  last.sizes[last.sizes.rank - 1] = channels;
  // Channels are innermost in memory, wherever they stand in the shape.
  Sizes strides = dense_strides(last);
  const int dim = call.dim("dim", last.sizes.rank);
  strides.erase(strides.rank - 1);
  strides.insert(dim, 1);
  const View out = low.fresh(low.type({node, 0}), strides);
  const int64_t rows = words.sizes.count() / words.sizes.back();
  const Where in = words.where, to = out.where;
  const Kernel* kernel = &low.kernel;
  low.step(node, {words}, {out}, [=](const Frame& f) {
    unpack(*kernel, f.at<const uint32_t>(in), DType::kF32, rows, channels, f.at<float>(to));
  });
  if (low.has_place(node))
    low.copied(out, low.out(node), node);
  else
    low.give(node, out);
}

}  // namespace bitkernels::network
