// Arguments of a call, checked as they are asked for.
#include <cmath>

#include "ops.h"

namespace bitkernels::network {

void Call::wrong(const char* name, const std::string& takes, const std::string& got) const {
  fail(quoted(node.name), ", a call of ", node.op->name, ": ", name, " must be ", takes, ", got ",
       got);
}

const Arg& Call::arg(const char* name) const {
  const auto& params = node.op->params;
  for (size_t i = 0; i < params.size(); ++i)
    if (params[i].name == name) return node.args[i];
  fail(node.op->name, " has no parameter ", name);
}

const Type& Call::type_of(const Arg& a, const char* name) const {
  if (a.kind != Arg::kNode) wrong(name, "a tensor", "none");
  const Value& v = values[static_cast<size_t>(a.integer)];
  if (v.kind != Value::kTensor) wrong(name, "a tensor", "a number or a pair");
  return v.type;
}

bool Call::is_tensor(const char* name) const {
  const Arg& a = arg(name);
  return a.kind == Arg::kNode && values[static_cast<size_t>(a.integer)].kind == Value::kTensor;
}

int Call::source(const char* name) const {
  const Arg& a = arg(name);
  return a.kind == Arg::kNode ? static_cast<int>(a.integer) : -1;
}

const Type& Call::tensor(const char* name) const { return type_of(arg(name), name); }

const Type& Call::real(const char* name) const {
  const Type& type = tensor(name);
  if (type.element != Element::kFloat32) wrong(name, "float32", text_of(type));
  return type;
}

const Type& Call::real(const char* name, int rank) const {
  const Type& type = real(name);
  if (type.sizes.rank != rank) wrong(name, text("of ", rank, " dimensions"), text_of(type));
  return type;
}

int64_t Call::integer_of(const Arg& a, const char* name) const {
  if (a.kind == Arg::kInt) return a.integer;
  if (a.kind == Arg::kNode && values[static_cast<size_t>(a.integer)].kind == Value::kInt)
    return values[static_cast<size_t>(a.integer)].integer;
  wrong(name, "an integer", a.kind == Arg::kNode ? "a tensor" : "none");
}

int64_t Call::integer(const char* name) const { return integer_of(arg(name), name); }

int64_t Call::integer(const char* name, int64_t least, int64_t most) const {
  const int64_t n = integer(name);
  if (n < least || n > most) wrong(name, text("in [", least, ", ", most, "]"), text(n));
  return n;
}

double Call::number(const char* name) const {
  const Arg& a = arg(name);
  if (a.kind == Arg::kReal || a.kind == Arg::kInt) return a.real;
  return static_cast<double>(integer_of(a, name));
}

bool Call::flag(const char* name) const { return arg(name).integer != 0; }

std::vector<int64_t> Call::integers(const char* name) const {
  const Arg& a = arg(name);
  std::vector<int64_t> list;
  if (a.kind == Arg::kInt) list.push_back(a.integer);
  for (const Arg& item : a.items) list.push_back(integer_of(item, name));
  return list;
}

std::pair<int64_t, int64_t> Call::pair(const char* name, int64_t least) const {
  const std::vector<int64_t> list = integers(name);
  constexpr int64_t kMost = 1 << 30;
  if (list.size() != 1 && list.size() != 2)
    wrong(name, "one or two integers", text(list.size(), " of them"));
  for (int64_t n : list)
    if (n < least || n > kMost) wrong(name, text("in [", least, ", ", kMost, "]"), text(n));
  return {list.front(), list.back()};
}

int Call::dim_of(const char* name, int64_t given, int rank) const {
  const int64_t n = std::max(rank, 1);
  if (given < -n || given >= n) wrong(name, text("in [", -n, ", ", n - 1, "]"), text(given));
  return static_cast<int>(given < 0 ? given + n : given);
}

int Call::dim(const char* name, int rank) const { return dim_of(name, integer(name), rank); }

const Node* Call::constant(const char* name) const {
  const int i = source(name);
  if (i < 0 || !graph.nodes[static_cast<size_t>(i)].tensor) return nullptr;
  return &graph.nodes[static_cast<size_t>(i)];
}

}  // namespace bitkernels::network
