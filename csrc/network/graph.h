// The graph of a file as nodes with their arguments in the order of each operator's schema.
#pragma once
#include <string>
#include <vector>

#include "json.h"
#include "safetensors.h"
#include "values.h"

namespace bitkernels::network {

struct Arg {
  enum Kind { kNone, kBool, kInt, kReal, kName, kNode, kList };
  Kind kind = kNone;
  int64_t integer = 0;  // of a bool and an integer, and the index of a node
  double real = 0;      // of an integer too
  std::string name;     // of a dtype, a memory format or a mode
  std::vector<Arg> items;
};

struct Op;

struct Node {
  std::string name;
  const Op* op = nullptr;  // null: an input or a constant
  std::vector<Arg> args;   // as op->params
  int input = -1;
  const SafeTensors::Entry* tensor = nullptr;  // of a constant
  Type type;                                   // of a constant
};

struct Input {
  std::string name;
  Element element;
  std::vector<std::string> names;  // of free sizes, "" where fixed
  Sizes sizes, example;
};

struct Graph {
  std::vector<Input> inputs;
  std::vector<Node> nodes;  // inputs first; arguments before their users
  std::vector<int> outputs;
};

// Throws Error for a file of another format or a later version, for calls that this engine does not
// have, and for arguments that are none of the call's.
Graph graph_of(const SafeTensors& file);

// One node's call with the values that its arguments have for given sizes of the inputs.
struct Value {
  enum Kind { kTensor, kInt, kTuple };
  Kind kind = kTensor;
  Type type;
  Type second;  // of a tuple of two tensors
  int64_t integer = 0;
};

class Call {
 public:
  Call(const Graph& graph, const Node& node, const std::vector<Value>& values)
      : graph(graph), node(node), values(values) {}

  const Arg& arg(const char* name) const;
  bool given(const char* name) const { return arg(name).kind != Arg::kNone; }
  bool is_tensor(const char* name) const;
  // The index of the node that an argument names.
  int source(const char* name) const;
  const Type& tensor(const char* name) const;
  const Type& real(const char* name) const;  // a float32 tensor
  const Type& real(const char* name, int rank) const;
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t least, int64_t most) const;
  double number(const char* name) const;
  bool flag(const char* name) const;
  std::vector<int64_t> integers(const char* name) const;
  // One or two integers, each at least `least`, as two.
  std::pair<int64_t, int64_t> pair(const char* name, int64_t least) const;
  // A dimension of `rank`, counted from 0.
  int dim(const char* name, int rank) const;
  int dim_of(const char* name, int64_t given, int rank) const;
  const Type& type_of(const Arg& arg, const char* name) const;
  // The constant behind an argument, null where it is none.
  const Node* constant(const char* name) const;

  [[noreturn]] void wrong(const char* name, const std::string& takes, const std::string& got) const;

  const Graph& graph;
  const Node& node;
  const std::vector<Value>& values;

 private:
  int64_t integer_of(const Arg& arg, const char* name) const;
};

}  // namespace bitkernels::network
