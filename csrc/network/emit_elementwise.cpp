// Steps of elementwise operators.
#include <cmath>
#include <limits>

#include "cpu/elementwise.h"
#include "emit.h"
#include "strided.h"

namespace bitkernels::network {
namespace {

// An operand that is one row for each image, (N, C, 1, 1) on (N, C, H, W).
bool is_gate(const Type& gate, const Type& whole) {
  return whole.sizes.rank == 4 && gate.sizes == Sizes{whole.sizes[0], whole.sizes[1], 1, 1};
}

template <class Out, class In, class F>
void binary_step(Lowering& low, int node, const View& out, const View& a, const View* b,
                 float number, const F& f) {
  const View& second = b ? *b : a;
  Strided order = strided(out, a, second);
  if (!b)
    for (int i = 0; i < order.sizes.rank; ++i) order.b[i] = 0;
  const Where x = a.where, y = second.where, to = out.where;
  const bool two = b != nullptr;
  std::vector<View> reads = {a};
  if (two) reads.push_back(second);
  low.step(node, reads, {out}, [=](const Frame& frame) {
    const In one = static_cast<In>(number);
    for_each(order, frame.at<Out>(to), frame.at<const In>(x), two ? frame.at<const In>(y) : &one,
             f);
  });
}

// Rows, by calls of a kernel on dense rows of n elements.
template <class F>
void row_step(Lowering& low, int node, const View& x, const View& out, const F& run) {
  const Rows rows = *rows_of(x);
  const int64_t step = rows_of(out)->row;
  const Where in = x.where, to = out.where;
  low.step(
      node, {x}, {out},
      [=](const Frame& f) {
        const float* from = f.at<const float>(in);
        float* dest = f.at<float>(to);
        parallel_for(rows.count, 1 + (1 << 14) / std::max<int64_t>(rows.channels, 1),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t r = begin; r < end; ++r)
                         run(from + r * rows.row, rows.channels, dest + r * step);
                     });
      },
      -1, 0);
}

// "add" of "aten.add.Tensor".
std::string operation(const Call& call) {
  const std::string name = call.node.op->name;
  return name.substr(5, name.find('.', 5) - 5);
}

// NaN stays NaN.
float to_six(float v) { return v < 0 ? 0 : v > 6 ? 6 : v; }

}  // namespace

void emit_affine(Lowering& low, int node) {
  const Chain& chain = low.chain(node);
  const View x = low.rows(chain.x), out = low.out(node);
  const Rows rows = *rows_of(x);
  RowsJob job = {};
  job.rows = rows.count, job.channels = rows.channels, job.x_row = rows.row;
  job.out_row = rows_of(out)->row;
  job.scale = chain.scale, job.shift = chain.shift, job.slope = chain.slope;
  job.lo = chain.lo, job.hi = chain.hi;
  std::vector<View> reads = {x};
  Where in = x.where, to = out.where, other;
  if (chain.y.node >= 0) {
    reads.push_back(low.rows(chain.y));
    job.y_row = rows_of(reads.back())->row;
    other = reads.back().where;
  }
  const Kernel* kernel = &low.kernel;
  low.step(
      node, reads, {out},
      [=](const Frame& f) {
        RowsJob j = job;
        j.x = f.at<const float>(in);
        if (other.buffer >= 0) j.y = f.at<const float>(other);
        j.out = f.at<float>(to);
        affine_rows(*kernel, j);
      },
      -1, 0);
}

void emit_sigmoid(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.resolved(call, "self")), out = low.out(node);
  RowsJob job = {};
  const Rows rows = *rows_of(x);
  job.rows = rows.count, job.channels = rows.channels, job.x_row = rows.row;
  job.out_row = rows_of(out)->row;
  const Where in = x.where, to = out.where;
  const Kernel* kernel = &low.kernel;
  low.step(
      node, {x}, {out},
      [=](const Frame& f) {
        RowsJob j = job;
        j.x = f.at<const float>(in);
        j.out = f.at<float>(to);
        sigmoid_rows(*kernel, j);
      },
      -1, 0);
}

void emit_unary(Lowering& low, const Call& call, int node) {
  const View x = low.view(low.resolved(call, "self")), out = low.out(node);
  const std::string name = operation(call);
  const auto of = [&](auto f) {
    binary_step<float, float>(low, node, out, x, nullptr, 0, [f](float v, float) { return f(v); });
  };
  if (name == "neg") {
    of([](float v) { return -v; });
  } else if (name == "abs") {
    of([](float v) { return std::fabs(v); });
  } else if (name == "round") {
    of([](float v) { return std::nearbyint(v); });
  } else if (name == "exp") {
    of([](float v) { return std::exp(v); });
  } else if (name == "sqrt") {
    of([](float v) { return std::sqrt(v); });
  } else if (name == "tanh") {
    of([](float v) { return std::tanh(v); });
  } else if (name == "silu") {
    of([](float v) { return v / (1 + std::exp(-v)); });
  } else if (name == "hardsigmoid") {
    of([](float v) { return to_six(v + 3) / 6; });
  } else if (name == "hardswish") {
    of([](float v) { return v * to_six(v + 3) / 6; });
  } else if (name == "elu") {
    const auto number = [&](const char* arg) { return static_cast<float>(call.number(arg)); };
    const float scale = number("scale"), below = number("alpha") * scale;
    const float inside = number("input_scale");
    of([=](float v) { return v > 0 ? v * scale : std::expm1(v * inside) * below; });
  } else if (call.arg("approximate").name == "tanh") {
    of([](float v) {
      return 0.5f * v * (1 + std::tanh(0.797884561f * (v + 0.044715f * v * v * v)));
    });
  } else {
    of([](float v) { return 0.5f * v * (1 + std::erf(v * 0.707106781f)); });
  }
}

void emit_binary(Lowering& low, const Call& call, int node) {
  const std::string name = operation(call);
  const View out = low.out(node);
  const Ref self = low.resolved(call, "self");
  const bool two = call.is_tensor("other");
  Ref other = two ? low.resolved(call, "other") : Ref();
  if (name == "mul" && two) {
    Ref whole = self, gate = other;
    if (low.type(self).sizes != out.sizes) std::swap(whole, gate);
    const bool gated = is_gate(low.type(gate), out) && !(low.type(gate) == out);
    if (low.type(whole).sizes == out.sizes && (gated || low.type(gate).sizes == out.sizes)) {
      const View x = low.rows(whole), y = gated ? low.dense(gate) : low.rows(gate);
      const Rows rows = *rows_of(x);
      const int64_t images = gated ? out.sizes[0] : 1, y_row = rows_of(y)->row;
      RowsJob job = {};
      job.rows = images ? rows.count / images : 0, job.channels = rows.channels;
      job.x_row = rows.row, job.out_row = rows_of(out)->row, job.y_row = gated ? 0 : y_row;
      const Where a = x.where, b = y.where, to = out.where;
      const Kernel* kernel = &low.kernel;
      low.step(
          node, {x, y}, {out},
          [=](const Frame& f) {
            RowsJob j = job;
            for (int64_t n = 0; n < images; ++n) {
              j.x = f.at<const float>(a) + n * job.rows * job.x_row;
              j.y = f.at<const float>(b) + n * job.channels;
              j.out = f.at<float>(to) + n * job.rows * job.out_row;
              multiply_rows(*kernel, j);
            }
          },
          -1, 0);
      return;
    }
  }
  const View a = low.view(self);
  View second;
  if (two) second = low.view(other);
  const View* b = two ? &second : nullptr;
  const float number = two ? 0 : static_cast<float>(call.number("other"));
  const auto real = [&](auto f) { binary_step<float, float>(low, node, out, a, b, number, f); };
  const auto test = [&](auto f) { binary_step<uint8_t, float>(low, node, out, a, b, number, f); };
  if (name == "add" || name == "sub") {
    const auto alpha = static_cast<float>(call.number("alpha") * (name == "sub" ? -1 : 1));
    real([alpha](float x, float y) { return x + alpha * y; });
  } else if (name == "mul") {
    real([](float x, float y) { return x * y; });
  } else if (name == "div") {
    real([](float x, float y) { return x / y; });
  } else if (name == "ge") {
    test([](float x, float y) -> uint8_t { return x >= y; });
  } else if (name == "le") {
    test([](float x, float y) -> uint8_t { return x <= y; });
  } else if (name == "gt") {
    test([](float x, float y) -> uint8_t { return x > y; });
  } else if (name == "lt") {
    test([](float x, float y) -> uint8_t { return x < y; });
  } else {
    binary_step<uint8_t, uint8_t>(low, node, out, a, b, 0,
                                  [](uint8_t x, uint8_t y) -> uint8_t { return x && y; });
  }
}

void emit_where(Lowering& low, const Call& call, int node) {
  const View c = low.view(low.resolved(call, "condition"));
  const View x = low.view(low.resolved(call, "self")), out = low.out(node);
  const auto other = static_cast<float>(call.number("other"));
  const Strided order = strided(out, c, x);
  const Where a = c.where, b = x.where, to = out.where;
  low.step(node, {c, x}, {out}, [=](const Frame& f) {
    for_each(order, f.at<float>(to), f.at<const uint8_t>(a), f.at<const float>(b),
             [other](uint8_t yes, float v) { return yes ? v : other; });
  });
}

void emit_softmax(Lowering& low, const Call& call, int node) {
  const View x = low.view(low.resolved(call, "self")), out = low.out(node);
  const int rank = x.sizes.rank;
  if (rank == 0) {
    const Where to = out.where;
    return low.step(node, {x}, {out}, [=](const Frame& f) { *f.at<float>(to) = 1; });
  }
  const int dim = call.dim("dim", rank);
  const int64_t n = x.sizes[dim], step_in = x.strides[dim], step_out = out.strides[dim];
  View first = x, dest = out;  // the first element of each sum
  first.sizes[dim] = dest.sizes[dim] = 1;
  const Strided order = strided(dest, first, first);
  const Where in = x.where, to = out.where;
  low.step(node, {x}, {out}, [=](const Frame& f) {
    float* begin = f.at<float>(to);
    const float* from = f.at<const float>(in);
    int64_t count = order.sizes.count();
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, at = 0, at_in = 0;
      for (int d = order.sizes.rank - 1; d >= 0; --d) {
        at += rest % order.sizes[d] * order.out[d], at_in += rest % order.sizes[d] * order.a[d];
        rest /= order.sizes[d];
      }
      float most = -std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < n; ++j) most = std::max(most, from[at_in + j * step_in]);
      double sum = 0;
      for (int64_t j = 0; j < n; ++j)
        sum += begin[at + j * step_out] = std::exp(from[at_in + j * step_in] - most);
      for (int64_t j = 0; j < n; ++j)
        begin[at + j * step_out] = static_cast<float>(begin[at + j * step_out] / sum);
    }
  });
}

void emit_rprelu(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.resolved(call, "input")), out = low.out(node);
  const auto vector = [&](const char* name) {
    return low.constants.floats(low.resolved(call, name).node);
  };
  const float *in = vector("shift_in"), *slope = vector("slope"), *shift = vector("shift_out");
  const Kernel* kernel = &low.kernel;
  row_step(low, node, x, out, [=](const float* from, int64_t n, float* to) {
    kernel->rprelu(from, DType::kF32, n, in, slope, shift, false, to);
  });
}

void emit_rsign(Lowering& low, const Call& call, int node) {
  const View x = low.rows(low.resolved(call, "input")), out = low.out(node);
  const float* shift = low.constants.floats(low.resolved(call, "shift").node);
  const Kernel* kernel = &low.kernel;
  row_step(low, node, x, out, [=](const float* from, int64_t n, float* to) {
    kernel->rsign(from, DType::kF32, n, shift, false, to);
  });
}

}  // namespace bitkernels::network
