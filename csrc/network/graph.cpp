#include "graph.h"

#include <algorithm>
#include <unordered_map>

#include "ops.h"

namespace bitkernels::network {
namespace {

constexpr size_t kMostNodes = 20000;
constexpr int64_t kVersion = 1;
using Index = std::unordered_map<std::string, int>;

const Json& member(const Json& object, const char* key, Json::Kind kind) {
  const Json* found = object.kind == Json::kObject ? object.find(key) : nullptr;
  if (!found || found->kind != kind) fail("the graph is broken: no ", key);
  return *found;
}

Arg argument(const Json& v, const Index& index) {
  Arg arg;
  switch (v.kind) {
    case Json::kNull:
      return arg;
    case Json::kBool:
      arg.kind = Arg::kBool;
      arg.integer = v.flag;
      return arg;
    case Json::kInt:
    case Json::kReal:
      arg.kind = v.kind == Json::kInt ? Arg::kInt : Arg::kReal;
      arg.integer = v.integer;
      arg.real = v.real;
      return arg;
    case Json::kString:
      arg.kind = Arg::kName;
      arg.name = v.string;
      return arg;
    case Json::kList:
      arg.kind = Arg::kList;
      for (const Json& item : v.items) arg.items.push_back(argument(item, index));
      return arg;
    default:
      break;
  }
  if (v.members.size() != 1 || v.members[0].second.kind != Json::kString)
    fail("the graph is broken: an argument that is no value");
  const auto& [kind, name] = v.members[0];
  arg.name = name.string;
  if (kind == "node") {
    const auto found = index.find(arg.name);
    if (found == index.end())
      fail("the graph is broken: ", quoted(arg.name), " is read before it is made");
    arg.kind = Arg::kNode;
    arg.integer = found->second;
  } else if (kind == "dtype" || kind == "memory_format" || kind == "layout" || kind == "device") {
    arg.kind = Arg::kName;
  } else {
    fail("the graph is broken: an argument of kind ", quoted(kind));
  }
  return arg;
}

bool fits(const Arg& arg, const Param& param) {
  const bool node = arg.kind == Arg::kNode;
  switch (param.kind) {
    case 'T':
      return node || (arg.kind == Arg::kNone && param.optional);
    case 'O':
      return node || arg.kind == Arg::kInt || arg.kind == Arg::kReal;
    case 'L':
      return arg.kind == Arg::kList && !arg.items.empty() &&
             std::all_of(arg.items.begin(), arg.items.end(),
                         [](const Arg& a) { return a.kind == Arg::kNode; });
    case 'i':
      return node || arg.kind == Arg::kInt || (arg.kind == Arg::kNone && param.optional);
    case 'f':
      return arg.kind == Arg::kInt || arg.kind == Arg::kReal ||
             (arg.kind == Arg::kNone && param.optional);
    case 'b':
      return arg.kind == Arg::kBool;
    case 'I':
      return arg.kind == Arg::kInt || (arg.kind == Arg::kNone && param.optional) ||
             (arg.kind == Arg::kList &&
              std::all_of(arg.items.begin(), arg.items.end(), [](const Arg& a) {
                return a.kind == Arg::kNode || a.kind == Arg::kInt;
              }));
    default:
      return arg.kind == Arg::kName || (arg.kind == Arg::kNone && param.optional);
  }
}

void fill_arguments(Node& node, const Json& args, const Json& kwargs, const Index& index) {
  const auto& params = node.op->params;
  const auto broken = [&](const std::string& why) {
    fail("the graph is broken: ", quoted(node.name), ", a call of ", node.op->name, ", ", why);
  };
  if (args.items.size() > params.size()) broken("has too many arguments");
  node.args.resize(params.size());
  size_t used = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Json* keyword = kwargs.find(params[i].name);
    used += keyword != nullptr;
    if (keyword && i < args.items.size()) broken("has " + params[i].name + " twice");
    if (!keyword && i >= args.items.size()) {
      if (params[i].required) broken("lacks " + params[i].name);
      node.args[i] = params[i].fallback;
      continue;
    }
    node.args[i] = argument(keyword ? *keyword : args.items[i], index);
    if (!fits(node.args[i], params[i])) broken("does not take this " + params[i].name);
  }
  if (used != kwargs.members.size()) broken("has an argument of a name that it does not know");
}

Element element_of(const Json& v, const std::string& name) {
  const Json* dtype = v.kind == Json::kObject ? v.find("dtype") : nullptr;
  for (int i = 0; dtype && i < 4; ++i)
    if (dtype->string == kElementNames[i]) return static_cast<Element>(i);
  fail("the input ", quoted(name), " is of type ", quoted(dtype ? dtype->string : ""),
       ", which this engine does not have");
}

Input input_of(const Json& v) {
  const auto& i = v.items;
  if (v.kind != Json::kList || i.size() != 4 || i[0].kind != Json::kString ||
      i[2].kind != Json::kList || i[3].kind != Json::kList ||
      i[2].items.size() != i[3].items.size())
    fail("the graph is broken: an input that is no tensor");
  Input input;
  input.name = i[0].string;
  input.element = element_of(i[1], input.name);
  for (size_t d = 0; d < i[2].items.size(); ++d) {
    const Json &size = i[2].items[d], &example = i[3].items[d];
    const bool free = size.kind == Json::kString;
    if (example.kind != Json::kInt || example.integer < 0 ||
        (!free && (size.kind != Json::kInt || size.integer != example.integer)))
      fail("the graph is broken: the sizes of ", quoted(input.name), " do not fit its example");
    input.names.push_back(free ? size.string : "");
    if (free && size.string.empty()) fail("the graph is broken: a size without a name");
    input.sizes.push(free ? -1 : size.integer);
    input.example.push(example.integer);
  }
  return input;
}

// Of a constant that some call reads; others need not be of a type that this engine has.
Type type_of(const SafeTensors::Entry& e) {
  static const std::pair<const char*, Element> kTypes[] = {{"F32", Element::kFloat32},
                                                           {"I32", Element::kInt32},
                                                           {"I64", Element::kInt64},
                                                           {"BOOL", Element::kBool},
                                                           {"I8", Element::kInt8}};
  for (const auto& [name, element] : kTypes) {
    if (e.type != name) continue;
    Type type = {element, {}};
    for (int64_t n : e.shape) type.sizes.push(n);
    return type;
  }
  fail("the tensor ", quoted(e.name), " is of type ", e.type, ", which this engine does not have");
}

// Int8 is for weights of int8 layers alone.
void check_int8(const Graph& graph, const Arg& arg) {
  for (const Arg& item : arg.items) check_int8(graph, item);
  if (arg.kind != Arg::kNode) return;
  const Node& node = graph.nodes[static_cast<size_t>(arg.integer)];
  if (node.tensor && node.type.element == Element::kInt8)
    fail("the tensor ", quoted(node.tensor->name),
         " is of type I8, which this engine has as a weight of int8 layers only");
}

void add_outputs(const Json& v, const Index& index, std::vector<int>& outputs) {
  if (v.kind == Json::kList) {
    for (const Json& item : v.items) add_outputs(item, index, outputs);
    return;
  }
  const Arg arg = argument(v, index);
  if (arg.kind != Arg::kNode) fail("the network gives a value that is no tensor");
  outputs.push_back(static_cast<int>(arg.integer));
}

}  // namespace

Graph graph_of(const SafeTensors& file) {
  const auto meta = [&](const char* key) {
    const Json* found = file.metadata().find(key);
    return found ? found->string : std::string();
  };
  if (meta("format") != "bitkernels.converted")
    fail("a safetensors file, but not one of save_converted: its format is ",
         quoted(meta("format")));
  if (meta("format_version") != std::to_string(kVersion))
    fail("the file has format version ", quoted(meta("format_version")), ", written by bitkernels ",
         quoted(meta("bitkernels")), "; this engine reads up to ", kVersion, ": update it");
  const std::string source = meta("graph");
  const Json root = parse_json("the graph", source.data(), source.data() + source.size());

  Graph graph;
  Index index;
  const auto add = [&](Node node) {
    if (graph.nodes.size() == kMostNodes) fail("a graph of more than ", kMostNodes, " nodes");
    if (!index.emplace(node.name, static_cast<int>(graph.nodes.size())).second)
      fail("the graph is broken: two nodes are called ", quoted(node.name));
    graph.nodes.push_back(std::move(node));
  };
  for (const Json& v : member(root, "inputs", Json::kList).items) {
    graph.inputs.push_back(input_of(v));
    Node node;
    node.name = graph.inputs.back().name;
    node.input = static_cast<int>(graph.inputs.size()) - 1;
    add(std::move(node));
  }
  for (const Json& v : member(root, "nodes", Json::kList).items) {
    const auto& i = v.items;
    if (v.kind != Json::kList || i.size() != 4 || i[0].kind != Json::kString ||
        i[1].kind != Json::kString || i[2].kind != Json::kList || i[3].kind != Json::kObject)
      fail("the graph is broken: a node that is no call");
    Node node;
    node.name = i[0].string;
    if (i[1].string == "constant") {
      if (i[2].items.size() != 1 || i[2].items[0].kind != Json::kString)
        fail("the graph is broken: a constant without a name");
      node.tensor = file.find(i[2].items[0].string);
      if (!node.tensor) fail("the file lacks the tensor ", quoted(i[2].items[0].string));
      node.type = type_of(*node.tensor);
    } else {
      node.op = find_op(i[1].string);
      if (!node.op)
        fail(quoted(node.name), " calls ", quoted(i[1].string),
             ", which this engine does not have");
      fill_arguments(node, i[2], i[3], index);
      const bool int8 = i[1].string.rfind("bitkernels.int8_", 0) == 0;
      for (size_t a = 0; a < node.args.size(); ++a)
        if (!int8 || node.op->params[a].name != "weight") check_int8(graph, node.args[a]);
    }
    add(std::move(node));
  }
  const Json* output = root.find("output");
  if (!output) fail("the graph is broken: no output");
  add_outputs(*output, index, graph.outputs);
  if (graph.outputs.empty()) fail("the graph is broken: no output");
  for (int o : graph.outputs) {
    Arg arg;
    arg.kind = Arg::kNode;
    arg.integer = o;
    check_int8(graph, arg);
  }
  return graph;
}

}  // namespace bitkernels::network
