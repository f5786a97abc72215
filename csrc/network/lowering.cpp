#include "lowering.h"

#include <cstring>

#include "cpu/elementwise.h"
#include "emit.h"
#include "strided.h"

namespace bitkernels::network {
namespace {

bool is_call(const Node& node, const char* name) {
  return node.op && std::strcmp(node.op->name, name) == 0;
}

template <class F>
void for_nodes(const Arg& arg, const F& f) {
  if (arg.kind == Arg::kNode) f(arg);
  for (const Arg& item : arg.items) for_nodes(item, f);
}

template <class T>
void copy_elements(const Strided& s, const Frame& f, Where to, Where from) {
  for_each(s, f.at<T>(to), f.at<const T>(from), f.at<const T>(from), [](T x, T) { return x; });
}

}  // namespace

Constants::Constants(const Graph& graph, const SafeTensors& file) : graph_(graph), file_(file) {}

Memory Constants::weight(int node) const {
  const Node& n = graph_.nodes[static_cast<size_t>(node)];
  Memory memory = allocate(n.tensor->bytes);
  std::memset(memory.get() + n.tensor->bytes, 0, kSlack);
  file_.read(*n.tensor, memory.get());
  return memory;
}

const void* Constants::raw(int node) {
  Memory& kept = kept_[{node, ""}];
  if (!kept) {
    kept = weight(node);
    bytes_ += graph_.nodes[static_cast<size_t>(node)].tensor->bytes;
  }
  return kept.get();
}

const void* Constants::made(int node, const char* role, int64_t bytes,
                            const std::function<void(void*)>& make) {
  Memory& kept = kept_[{node, role}];
  if (!kept) {
    Memory memory = allocate(bytes);
    std::memset(memory.get(), 0, static_cast<size_t>(bytes + kSlack));
    make(memory.get());
    kept = std::move(memory);
    bytes_ += bytes;
  }
  return kept.get();
}

Lowering::Lowering(const Graph& g, Constants& c, const Kernel& k, Plan& plan)
    : graph(g), constants(c), kernel(k), plan_(plan) {}

Call Lowering::call(int node) const {
  return {graph, graph.nodes[static_cast<size_t>(node)], values_};
}

Ref Lowering::resolved(const Arg& arg) const { return same_[static_cast<size_t>(arg.integer)]; }

const Type& Lowering::type(Ref ref) const {
  const Value& v = values_[static_cast<size_t>(ref.node)];
  return ref.index ? v.second : v.type;
}

void Lowering::infer() {
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    Value v;
    Ref same = {static_cast<int>(i), 0};
    if (node.input >= 0) {
      v.type = {graph.inputs[static_cast<size_t>(node.input)].element,
                plan_.inputs[static_cast<size_t>(node.input)].sizes};
      v.type.bytes();
    } else if (node.tensor) {
      v.type = node.type;
    } else {
      const Call c(graph, node, values_);
      v = node.op->infer(c);
      if (node.op->fuse == Fuse::kSame) {
        same = resolved(c.arg("self"));
        if (is_call(node, "size.getitem")) same.index = static_cast<int>(c.integer("index"));
      }
    }
    if (v.kind != Value::kInt &&
        std::max(v.type.bytes(), v.kind == Value::kTuple ? v.second.bytes() : 0) > kMostBytes)
      fail(quoted(node.name), " has too large an output: ", text_of(v.type));
    values_.push_back(v);
    same_.push_back(same);
  }
}

// How often each node is read by others that the outputs need; those that only pass a value on are
// looked through.
void Lowering::count_uses() {
  uses_.assign(graph.nodes.size(), 0);
  for (int o : graph.outputs) {
    const Value& v = values_[static_cast<size_t>(o)];
    if (v.kind != Value::kTensor) fail("the network gives a value that is no tensor");
    ++uses(same_[static_cast<size_t>(o)]);
  }
  for (size_t i = graph.nodes.size(); i-- > 0;) {
    const Node& node = graph.nodes[i];
    if (uses_[i] == 0 || values_[i].kind == Value::kInt) continue;
    for (const Arg& arg : node.args)
      for_nodes(arg, [&](const Arg& a) {
        if (values_[static_cast<size_t>(a.integer)].kind != Value::kInt) ++uses(resolved(a));
      });
  }
}

View Lowering::fresh(const Type& type, const Sizes& strides) {
  Buffer buffer;
  buffer.kind = Buffer::kArena;
  buffer.bytes = reach_of(type, strides);
  plan_.buffers.push_back(buffer);
  View v;
  static_cast<Type&>(v) = type;
  v.where = {static_cast<int>(plan_.buffers.size()) - 1, 0};
  v.strides = strides;
  return v;
}

View Lowering::out(int node, int index) {
  View& v = views_[static_cast<size_t>(node)][static_cast<size_t>(index)];
  if (v.where.buffer < 0) {
    const Type& t = type({node, index});
    v = fresh(t, spread_strides(t));
  }
  return v;
}

View Lowering::view(Ref ref) {
  View& v = views_[static_cast<size_t>(ref.node)][static_cast<size_t>(ref.index)];
  const Node& node = graph.nodes[static_cast<size_t>(ref.node)];
  if (v.where.buffer < 0 && node.tensor) {
    Type type = node.type;
    Sizes strides = type.sizes;  // as the file has it: the last dimension innermost
    for (int64_t i = type.sizes.rank - 1, step = 1; i >= 0; --i) {
      strides[static_cast<int>(i)] = step;
      step *= std::max<int64_t>(type.sizes[static_cast<int>(i)], 1);
    }
    v = fresh(type, strides);
    plan_.buffers.back().kind = Buffer::kConstant;
    plan_.buffers.back().data = constants.raw(ref.node);
  }
  if (v.where.buffer < 0) fail(quoted(node.name), " is read before it is made");
  return v;
}

View Lowering::copied(const View& from, const View& to, int node) {
  const Where a = from.where, b = to.where;
  const auto image = [](const View& v) {  // planes of pixels next to each other
    return v.element == Element::kFloat32 && v.sizes.rank == 4 && v.strides[3] == 1 &&
           v.strides[2] == v.sizes[3];
  };
  const auto is_rows = [](const View& v) {
    return v.element == Element::kFloat32 && v.sizes.rank == 4 && rows_of(v);
  };
  const Sizes s = from.sizes;
  const bool to_rows = image(from) && is_rows(to);
  if (to_rows || (is_rows(from) && image(to))) {
    const View &planes = to_rows ? from : to, &rows = to_rows ? to : from;
    const int64_t plane = planes.strides[1], row = rows_of(rows)->row, pixels = s[2] * s[3];
    const int64_t step_a = from.strides[0], step_b = to.strides[0];
    step(node, {from}, {to}, [=](const Frame& f) {
      for (int64_t n = 0; n < s[0]; ++n) {
        const float* x = f.at<const float>(a) + n * step_a;
        float* y = f.at<float>(b) + n * step_b;
        if (to_rows)
          planes_to_rows(x, plane, s[1], pixels, y, row);
        else
          rows_to_planes(x, row, s[1], pixels, y, plane);
      }
    });
  } else {
    const Strided order = strided(to, from, from);
    const int64_t bytes = bytes_of(from.element);
    step(node, {from}, {to}, [=](const Frame& f) {
      if (bytes == 8) return copy_elements<int64_t>(order, f, b, a);
      if (bytes == 4) return copy_elements<uint32_t>(order, f, b, a);
      copy_elements<uint8_t>(order, f, b, a);
    });
  }
  if (from.sizes.count() > 0) plan_.steps.back().call = "copy";
  return to;
}

View Lowering::rows(const View& v, int node) {
  if (rows_of(v)) return v;
  return copied(v, fresh(v, dense_strides(v)), node);
}

View Lowering::rows(Ref ref) {
  const View v = view(ref);
  if (rows_of(v)) return v;
  const auto key = std::pair(ref.node, ref.index);
  const auto found = in_rows_.find(key);
  if (found != in_rows_.end()) return found->second;
  return in_rows_[key] = rows(v, ref.node);
}

View Lowering::dense(Ref ref) {
  const View v = rows(ref);
  return is_dense(v) ? v : copied(v, fresh(v, dense_strides(v)), ref.node);
}

void Lowering::step(int node, const std::vector<View>& reads, const std::vector<View>& writes,
                    std::function<void(const Frame&)> run, int weight, int in_place) {
  int64_t count = 0;
  for (const View& v : writes) count += v.sizes.count();
  if (count == 0) return;
  Step s;
  const Chain& chain = chains_[static_cast<size_t>(node)];
  const Node& named = graph.nodes[static_cast<size_t>(node)];
  const Node& head = chain.active ? graph.nodes[static_cast<size_t>(chain.head)] : named;
  s.name = named.name.c_str();
  s.call = head.op ? head.op->name : "input";
  s.weight = weight < 0 ? "" : graph.nodes[static_cast<size_t>(weight)].tensor->name.c_str();
  for (const View& v : reads) s.reads.push_back(v.where.buffer);
  for (const View& v : writes) s.writes.push_back(v.where.buffer);
  if (in_place >= 0) {
    const View& over = reads[static_cast<size_t>(in_place)];
    int readers = 0;
    for (const View& v : reads) readers += v.where.buffer == over.where.buffer;
    if (readers == 1 && rows_of(over) && over.strides == writes[0].strides &&
        over.where.offset == 0 && writes[0].where.offset == 0)
      s.in_place = over.where.buffer;
  }
  s.run = std::move(run);
  plan_.steps.push_back(std::move(s));
}

// Outputs are written where the caller wants them by the call that makes them, where one does.
void Lowering::place_outputs() {
  for (size_t i = 0; i < graph.outputs.size(); ++i) {
    const Ref ref = same_[static_cast<size_t>(graph.outputs[i])];
    const Type& t = type(ref);
    View v = fresh(t, dense_strides(t));
    plan_.buffers.back().kind = Buffer::kOutput;
    plan_.buffers.back().index = static_cast<int>(i);
    plan_.outputs.push_back(v);
    const Node& node = graph.nodes[static_cast<size_t>(ref.node)];
    View& place = views_[static_cast<size_t>(ref.node)][static_cast<size_t>(ref.index)];
    if (node.op && node.op->emit != emit_view && place.where.buffer < 0) place = v;
  }
}

// Parts of a concatenation along the channels are written in their place by the calls that make
// them.
void Lowering::place_parts(int node) {
  const Call c = call(node);
  const Type& t = type({node, 0});
  const int dim = c.dim("dim", t.sizes.rank);
  const View whole = out(node);
  if (t.element != Element::kFloat32 || dim != channel_dim(t)) return;
  int64_t first = 0;
  for (const Arg& arg : c.arg("tensors").items) {
    const Ref ref = resolved(arg);
    const Node& part = graph.nodes[static_cast<size_t>(ref.node)];
    View v = whole;
    static_cast<Type&>(v) = type(ref);
    v.where.offset += first * whole.strides[dim] * 4;
    first += v.sizes[dim];
    if (part.op && part.op->emit != emit_view && part.op->emit != emit_unpack && ref.index == 0 &&
        !has_place(ref.node))
      give(ref.node, v);
  }
}

void Lowering::run() {
  infer();
  count_uses();
  chains_.resize(graph.nodes.size());
  pads_.resize(graph.nodes.size());
  sources_.resize(graph.nodes.size());
  repeated_.resize(graph.nodes.size());
  views_.resize(graph.nodes.size());
  fuse();
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const int input = graph.nodes[i].input;
    if (input < 0) continue;
    const View& given = plan_.inputs[static_cast<size_t>(input)];
    View& v = views_[i][0];
    v = fresh(type({static_cast<int>(i), 0}), given.strides);
    plan_.buffers.back().kind = Buffer::kInput;
    plan_.buffers.back().index = input;
  }
  place_outputs();
  for (int i = static_cast<int>(graph.nodes.size()) - 1; i >= 0; --i)
    if (uses_[static_cast<size_t>(i)] > 0 &&
        is_call(graph.nodes[static_cast<size_t>(i)], "aten.cat.default"))
      place_parts(i);
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    const Node& node = graph.nodes[i];
    const int at = static_cast<int>(i);
    if (!node.op || uses_[i] <= 0 || values_[i].kind == Value::kInt) continue;
    const Chain& chain = chains_[i];
    if (chain.active && chain.conv >= 0)
      graph.nodes[static_cast<size_t>(chain.conv)].op->emit(*this, call(chain.conv), at);
    else if (chain.active)
      emit_affine(*this, at);
    else
      node.op->emit(*this, call(at), at);
  }
  for (size_t i = 0; i < graph.outputs.size(); ++i) {
    const Ref ref = same_[static_cast<size_t>(graph.outputs[i])];
    const View made = view(ref);
    if (made.where.buffer != plan_.outputs[i].where.buffer)
      copied(made, plan_.outputs[i], ref.node);
  }
  place(plan_);
}

}  // namespace bitkernels::network
