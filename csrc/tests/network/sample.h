// A small network's file, made here: what the tests load, run and break.
#pragma once
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace sample {

struct File {
  std::string tensors, entries, nodes;
  std::mt19937 random{7};

  std::string constant(const std::string& name, const std::vector<int64_t>& shape,
                       const std::string& type) {
    int64_t count = 1;
    std::string sizes;
    for (int64_t n : shape) {
      count *= n;
      sizes += (sizes.empty() ? "" : ", ") + std::to_string(n);
    }
    const size_t begin = tensors.size();
    for (int64_t i = 0; i < count; ++i) {
      const float real = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
      const uint32_t word = random();
      char bytes[4];
      std::memcpy(bytes, type == "F32" ? static_cast<const void*>(&real) : &word, 4);
      tensors.append(bytes, type == "I8" ? 1 : 4);
    }
    entries += (entries.empty() ? "" : ", ") + ("\"" + name + "\": {\"dtype\": \"") + type +
               "\", \"shape\": [" + sizes + "], \"data_offsets\": [" + std::to_string(begin) +
               ", " + std::to_string(tensors.size()) + "]}";
    node(name + "_1", "constant", "'" + name + "'");
    return name + "_1";
  }
  std::string real(const std::string& name, const std::vector<int64_t>& shape) {
    return "{'node': '" + constant(name, shape, "F32") + "'}";
  }
  std::string int8(const std::string& name, const std::vector<int64_t>& shape) {
    return "{'node': '" + constant(name, shape, "I8") + "'}";
  }
  std::string words(const std::string& name, const std::vector<int64_t>& shape) {
    return "{'node': '" + constant(name, shape, "I32") + "'}";
  }
  void node(const std::string& name, const std::string& call, const std::string& args,
            const std::string& kwargs = "") {
    nodes += (nodes.empty() ? "" : ", ") +
             ("['" + name + "', '" + call + "', [" + args + "], {" + kwargs + "}]");
  }

  std::string header(const std::string& inputs, const std::string& output) const {
    std::string graph =
        "{'inputs': [" + inputs + "], 'nodes': [" + nodes + "], 'output': " + output + "}";
    std::string escaped;
    for (char c : graph) escaped += c == '\'' ? "\\\"" : std::string(1, c);
    return "{\"__metadata__\": {\"format\": \"bitkernels.converted\", \"format_version\": \"1\", "
           "\"bitkernels\": \"0\", \"graph\": \"" +
           escaped + "\"}, " + entries + "}";
  }
};

inline std::string whole(const std::string& header, const std::string& tensors) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> 8 * i & 0xff);
  return file + header + tensors;
}

inline std::string at(const std::string& name) { return "{'node': '" + name + "'}"; }

// pad_value: of the binary layers; 0 is what runs without copies of their inputs.
inline File network(int pad_value) {
  File f;
  const std::string pad = std::to_string(pad_value);
  f.node("padded", "aten.pad.default", at("x") + ", [0, 1, 0, 1], 'constant', 0.0");
  f.node("stem", "aten.conv2d.default",
         at("padded") + ", " + f.real("stem.weight", {16, 3, 3, 3}) + ", " +
             f.real("stem.bias", {16}) + ", [2, 2]");
  f.node("active", "aten.relu.default", at("stem"));
  f.node("signs", "bitkernels.sign_pack.default",
         at("active") + ", " + f.real("shift", {16}) + ", 1");
  f.node("both", "bitkernels.packed_conv2d.both", "",
         "'words': " + at("signs") + ", 'weight_words': " + f.words("one", {32, 3, 3, 1}) +
             ", 'channels': 16, 'padding': [1, 1], 'pad_value': " + pad +
             ", 'scale': " + f.real("scale", {32}) + ", 'bias': " + f.real("bias", {32}) +
             ", 'slope': " + f.real("slope", {32}));
  f.node("real", "size.getitem", at("both") + ", 0");
  f.node("words", "size.getitem", at("both") + ", 1");
  f.node(
      "second", "bitkernels.packed_conv2d.default",
      at("words") + ", " + f.words("two", {32, 3, 3, 1}) + ", 32, [1, 1], [1, 1, 1, 1], [1, 1], 1",
      "'pad_value': " + pad + ", 'residual': " + at("real"));
  f.node("joined", "aten.cat.default", "[" + at("real") + ", " + at("second") + "], 1");
  f.node("normal", "aten.batch_norm.default",
         at("joined") + ", null, " + f.real("beta", {64}) + ", " + f.real("mean", {64}) + ", " +
             f.real("var", {64}) + ", false, 0.1, 1.5, false");
  f.node("prelu", "aten.prelu.default", at("normal") + ", " + f.real("prelu.weight", {64}));
  f.node("pooled", "aten.mean.dim", at("prelu") + ", [2, 3]");
  f.node("one_more", "aten.unsqueeze.default", at("pooled") + ", 2");
  f.node("image", "aten.unsqueeze.default", at("one_more") + ", 3");
  f.node("gate_conv", "aten.conv2d.default", at("image") + ", " + f.real("gate", {64, 64, 1, 1}));
  f.node("gate_sigmoid", "aten.sigmoid.default", at("gate_conv"));
  f.node("gated", "aten.mul.Tensor", at("prelu") + ", " + at("gate_sigmoid"));
  f.node("max", "aten.max_pool2d.default", at("gated") + ", [3, 3], [2, 2], [1, 1]");
  f.node("fewer", "bitkernels.packed_max_pool2d.default", at("words") + ", [3, 3], [2, 2], [1, 1]");
  f.node("unpacked", "bitkernels.unpack.default", at("fewer") + ", 32, {'dtype': 'float32'}, 1");
  f.node("wide", "aten.cat.default", "[" + at("unpacked") + ", " + at("unpacked") + "], 1");
  f.node("sum", "aten.add.Tensor", at("max") + ", " + at("wide"));
  f.node("avg", "aten.avg_pool2d.default", at("sum") + ", [2, 2], [1, 1]");
  f.node("rounded", "bitkernels.int8_conv2d.default",
         at("avg") + ", " + f.int8("eight", {64, 32, 3, 3}) + ", " + f.real("eight.scale", {64}) +
             ", null, 20.5, [1, 1], [1, 0, 2, 1], [1, 1], 2");
  f.node("bounded", "aten.relu.default", at("rounded"));
  f.node("adaptive", "aten.adaptive_avg_pool2d.default", at("bounded") + ", [2, 2]");
  f.node("turned", "aten.permute.default", at("adaptive") + ", [0, 2, 3, 1]");
  f.node("flat", "aten.flatten.using_ints", at("turned") + ", 1");
  f.node("logits", "aten.linear.default",
         at("flat") + ", " + f.real("head", {10, 256}) + ", " + f.real("head.bias", {10}));
  f.node("more", "bitkernels.int8_linear.default",
         at("logits") + ", " + f.int8("ten", {10, 10}) + ", " + f.real("ten.scale", {10}) + ", " +
             f.real("ten.bias", {10}) + ", 3");
  f.node("odds", "aten.softmax.int", at("more") + ", 1");
  return f;
}

inline std::string header_of(const File& f) {
  return f.header("['x', {'dtype': 'float32'}, ['n', 3, 12, 12], [2, 3, 12, 12]]",
                  "[" + at("logits") + ", " + at("odds") + "]");
}

}  // namespace sample
