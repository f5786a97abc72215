// Which calls become one step: zero padding into the layer behind it, a repeated residual into a
// binary layer, bounds into a convolution's own, and rows of elementwise calls into one pass. In
// order of a chain's stages: 1 scale, 2 shift, 3 a second operand, 4 slope below 0, 5 bounds.
#include <cmath>
#include <cstring>

#include "emit.h"

namespace bitkernels::network {
namespace {

// Vectors are made when a network is loaded, for sizes that a file may say without holding them.
constexpr int64_t kMostChannels = 1 << 20;
constexpr int kScale = 1, kShift = 2, kOperand = 3, kSlope = 4, kBounds = 5;

// Bounds of a call on `self`.
std::pair<float, float> bounds_of(const Call& call) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const std::string op = call.node.op->name;
  if (op == "aten.relu.default") return {0.0f, inf};
  if (op == "aten.relu6.default") return {0.0f, 6.0f};
  const bool hard = op == "aten.hardtanh.default";
  const char *low = hard ? "min_val" : "min", *high = hard ? "max_val" : "max";
  const auto bound = [&](const char* name, float none) {
    if (op == "aten.clamp_min.default" && std::strcmp(name, "max") == 0) return none;
    if (!call.given(name)) return none;
    const double value = call.number(name);
    if (std::isnan(value)) call.wrong(name, "a number", "nan");
    return static_cast<float>(value);
  };
  return {bound(low, -inf), bound(high, inf)};
}

}  // namespace

// A vector with one number a channel, from a number or a constant; null where that is none.
const float* Lowering::channel_vector(const Call& call, const char* name, const Type& x,
                                      bool negative, const char* role) {
  const int dim = channel_dim(x);
  const int64_t channels = x.sizes.rank ? x.sizes[dim] : 1;
  if (channels > kMostChannels) return nullptr;
  const float* from = nullptr;
  float value = 0;
  int64_t step = 0;
  if (!call.is_tensor(name)) {
    value = static_cast<float>(call.number(name));
    from = &value;
  } else {
    const Ref ref = resolved(call, name);
    const Node& node = graph.nodes[static_cast<size_t>(ref.node)];
    if (!node.tensor || node.type.element != Element::kFloat32) return nullptr;
    const Sizes& s = node.type.sizes;
    const int axis = dim - (x.sizes.rank - s.rank);
    const int64_t count = s.count();
    if (s.rank > x.sizes.rank ||
        (count != 1 && (axis < 0 || s[axis] != count || count != channels)))
      return nullptr;
    from = constants.floats(ref.node);
    step = count != 1;
  }
  const int self = static_cast<int>(&call.node - graph.nodes.data());
  return static_cast<const float*>(
      constants.made(self, text(role, channels).c_str(), channels * 4, [&](void* to) {
        for (int64_t i = 0; i < channels; ++i)
          static_cast<float*>(to)[i] = negative ? -from[i * step] : from[i * step];
      }));
}

// The chain that `from` ends, if this node alone reads it and the next call may join; else a new
// one. Whether it joined.
bool Lowering::append(int node, Ref from, int stage, Chain& chain) {
  const Chain& before = chains_[static_cast<size_t>(from.node)];
  const bool later = stage == kBounds ? before.stage <= kBounds : before.stage < stage;
  const bool joins = before.active && from.index == 0 && uses(from) == 1 && later &&
                     (before.conv < 0 || stage == kBounds);
  if (joins) {
    chain = before;
    uses(from) = 0;
  } else {
    chain.x = from;
    chain.head = node;
  }
  chain.active = true;
  chain.stage = stage;
  return joins;
}

void Lowering::fuse_pad(int node, bool max) {
  const Call c = call(node);
  const char* name = c.node.op->fuse == Fuse::kConv ? "input" : "self";
  const Ref ref = resolved(c, name);
  sources_[static_cast<size_t>(node)] = ref;
  const Node& from = graph.nodes[static_cast<size_t>(ref.node)];
  if (!from.op || from.op->emit != emit_pad) return;
  const Call pad = call(ref.node);
  const Type& whole = type(ref);
  const std::vector<int64_t> p = pads_of(pad, pad.tensor("self"));
  for (size_t i = 4; i < p.size(); ++i)
    if (p[i]) return;
  Pads pads;
  if (p.size() >= 2) pads.left = p[0], pads.right = p[1];
  if (p.size() >= 4) pads.top = p[2], pads.bottom = p[3];
  const double value = pad.given("value") ? pad.number("value") : 0;
  const Ref source = resolved(pad, "self");
  if (c.node.op->fuse != Fuse::kConv) {
    const auto own = c.pair("padding", 0);
    if (own.first || own.second || c.flag("ceil_mode")) return;
  }
  if (max && !(std::isinf(value) && value < 0)) {
    // Zeros are minus infinity's equals where no value is below them and no window lacks a value.
    const Chain& before = chains_[static_cast<size_t>(source.node)];
    const Window w = pool_window(c, 2);
    const int64_t height = whole.sizes[2] - pads.top - pads.bottom;
    const int64_t width = whole.sizes[3] - pads.left - pads.right;
    const bool seen = pads.top <= w.dilation_h * (w.kh - 1) && w.dilation_h == 1 &&
                      w.dilation_w == 1 && pads.left <= w.kw - 1 &&
                      (w.out_h - 1) * w.stride_h - pads.top < height &&
                      (w.out_w - 1) * w.stride_w - pads.left < width;
    if (value != 0 || !before.active || before.lo < 0 || !seen) return;
  } else if (!max && value != 0) {
    return;
  }
  pads_[static_cast<size_t>(node)] = pads;
  sources_[static_cast<size_t>(node)] = source;
  ++uses(source);
  if (--uses(ref) == 0) --uses(source);
}

// A residual that is a tensor given twice or more along the channels is read there again.
void Lowering::fuse_repeats(int node) {
  const Call c = call(node);
  if (!c.given("residual") || c.integer("groups") != 1) return;
  const Ref ref = resolved(c, "residual");
  const Node& from = graph.nodes[static_cast<size_t>(ref.node)];
  if (!from.op || from.op->emit != emit_cat || uses(ref) != 1) return;
  const Call cat = call(ref.node);
  const Type& whole = type(ref);
  const auto& parts = cat.arg("tensors").items;
  const Ref first = resolved(parts.front());
  if (cat.dim("dim", whole.sizes.rank) != channel_dim(whole) ||
      type(first).sizes[channel_dim(whole)] % (2 * kTile) != 0)
    return;
  for (const Arg& part : parts) {
    const Ref other = resolved(part);
    if (other.node != first.node || other.index != first.index) return;
  }
  repeated_[static_cast<size_t>(node)] = first;
  uses(ref) = 0;
  uses(first) -= static_cast<int>(parts.size()) - 1;
}

void Lowering::fuse_node(int node) {
  const Call c = call(node);
  Chain& chain = chains_[static_cast<size_t>(node)];
  Chain next;
  switch (c.node.op->fuse) {
    case Fuse::kConv:
      fuse_pad(node, false);
      next.active = true;
      next.conv = next.head = node;
      chain = next;
      return;
    case Fuse::kBinary:
      return fuse_repeats(node);
    case Fuse::kAvgPool:
    case Fuse::kMaxPool:
      return fuse_pad(node, c.node.op->fuse == Fuse::kMaxPool);
    case Fuse::kNorm: {
      append(node, resolved(c, "input"), kScale, next);
      next.stage = kShift;
      const int64_t channels = c.tensor("input").sizes[1];
      const auto values = [&](const char* name) {
        return c.given(name) ? constants.floats(resolved(c, name).node) : nullptr;
      };
      const float *weight = values("weight"), *bias = values("bias");
      const float *mean = values("running_mean"), *var = values("running_var");
      const auto eps = static_cast<float>(c.number("eps"));
      const auto scale = [&](int64_t i) {
        return 1 / std::sqrt(var[i] + eps) * (weight ? weight[i] : 1.0f);
      };
      next.scale =
          static_cast<const float*>(constants.made(node, "scale", channels * 4, [&](void* to) {
            for (int64_t i = 0; i < channels; ++i) static_cast<float*>(to)[i] = scale(i);
          }));
      next.shift =
          static_cast<const float*>(constants.made(node, "shift", channels * 4, [&](void* to) {
            for (int64_t i = 0; i < channels; ++i)
              static_cast<float*>(to)[i] = (bias ? bias[i] : 0.0f) - mean[i] * scale(i);
          }));
      chain = next;
      return;
    }
    case Fuse::kSum:
    case Fuse::kProduct: {
      const bool sum = c.node.op->fuse == Fuse::kSum;
      const bool negative = std::strstr(c.node.op->name, "sub") != nullptr;
      if (sum && c.number("alpha") != 1) return;
      const char* role = sum ? "shift" : "scale";
      const Type& all = type({node, 0});
      for (const auto& [x, v] : {std::pair("self", "other"), std::pair("other", "self")}) {
        if (!c.is_tensor(x) || !(c.tensor(x) == all) || (negative && x[0] == 'o')) continue;
        const float* vector = channel_vector(c, v, all, negative, role);
        if (!vector) continue;
        append(node, resolved(c, x), sum ? kShift : kScale, next);
        (sum ? next.shift : next.scale) = vector;
        chain = next;
        return;
      }
      if (!sum || negative || !c.is_tensor("other") || !(c.tensor("self") == all) ||
          !(c.tensor("other") == all))
        return;
      const Ref a = resolved(c, "self"), b = resolved(c, "other");
      Chain second;
      if (!append(node, a, kOperand, next) && append(node, b, kOperand, second)) {
        next = second;
        next.y = a;
      } else {
        next.y = b;
      }
      chain = next;
      return;
    }
    case Fuse::kSlope: {
      const bool leaky = std::strcmp(c.node.op->name, "aten.leaky_relu.default") == 0;
      const float* slope = nullptr;
      if (leaky || c.tensor("weight").sizes.count() == 1)
        slope =
            channel_vector(c, leaky ? "negative_slope" : "weight", type({node, 0}), false, "slope");
      else
        slope = constants.floats(resolved(c, "weight").node);
      if (!slope) c.wrong("self", text("at most ", kMostChannels, " channels wide"), "more");
      append(node, resolved(c, "self"), kSlope, next);
      next.slope = slope;
      chain = next;
      return;
    }
    case Fuse::kBounds: {
      const auto [lo, hi] = bounds_of(c);
      append(node, resolved(c, "self"), kBounds, next);
      next.lo = std::min(std::max(next.lo, lo), hi);
      next.hi = std::min(std::max(next.hi, lo), hi);
      chain = next;
      return;
    }
    default:
      return;
  }
}

void Lowering::fuse() {
  for (size_t i = 0; i < graph.nodes.size(); ++i)
    if (graph.nodes[i].op && uses_[i] > 0) fuse_node(static_cast<int>(i));
}

}  // namespace bitkernels::network
