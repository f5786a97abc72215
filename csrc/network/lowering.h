// From a graph and sizes to steps: which calls become one step, and where each writes.
#pragma once
#include <array>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"
#include "plan.h"

namespace bitkernels::network {

// Constants as the kernels read them, made once for all plans of a network.
class Constants {
 public:
  Constants(const Graph& graph, const SafeTensors& file);

  // A tensor of the file in memory of its own.
  const void* raw(int node);
  const float* floats(int node) { return static_cast<const float*>(raw(node)); }
  // What `make` fills, `bytes` of it, zeros before; made once for a node and role.
  const void* made(int node, const char* role, int64_t bytes,
                   const std::function<void(void*)>& make);
  // A weight that is read only to be arranged: not kept.
  Memory weight(int node) const;
  int64_t bytes() const { return bytes_; }

 private:
  const Graph& graph_;
  const SafeTensors& file_;
  std::map<std::pair<int, std::string>, Memory> kept_;
  int64_t bytes_ = 0;
};

struct Ref {
  int node = -1;
  int index = 0;  // of a pair
};

// Elementwise calls in a row, as one step: clamp(act((conv(x) or x) * scale + shift + y), lo, hi).
struct Chain {
  bool active = false;
  int head = -1;  // its first call
  int conv = -1;  // the node of a convolution or linear layer in front; it takes lo and hi alone
  Ref x, y;
  const float *scale = nullptr, *shift = nullptr, *slope = nullptr;
  float lo = -std::numeric_limits<float>::infinity(), hi = std::numeric_limits<float>::infinity();
  int stage = 0;  // of the last call in it, see fuse.cpp
};

class Lowering {
 public:
  Lowering(const Graph& graph, Constants& constants, const Kernel& kernel, Plan& plan);
  // All steps for inputs of the plan's sizes.
  void run();

  Call call(int node) const;
  Ref resolved(const Arg& arg) const;
  Ref resolved(const Call& call, const char* name) const { return resolved(call.arg(name)); }
  const Type& type(Ref ref) const;

  View view(Ref ref);  // as it lies
  View rows(Ref ref);  // in rows of channels, copied where it is not
  View rows(const View& v, int node);
  View dense(Ref ref);                // without gaps, in the order of memory of our own
  View out(int node, int index = 0);  // where a node is to write, in rows
  View fresh(const Type& type, const Sizes& strides);  // memory of its own
  void give(int node, const View& view) { views_[static_cast<size_t>(node)][0] = view; }
  bool has_place(int node) const { return views_[static_cast<size_t>(node)][0].where.buffer >= 0; }
  View copied(const View& from, const View& to, int node);

  // A step of `node`; writes[0] may be written over reads[in_place].
  void step(int node, const std::vector<View>& reads, const std::vector<View>& writes,
            std::function<void(const Frame&)> run, int weight = -1, int in_place = -1);

  const Chain& chain(int node) const { return chains_[static_cast<size_t>(node)]; }
  const Pads& pads(int node) const { return pads_[static_cast<size_t>(node)]; }
  const Ref& source(int node) const { return sources_[static_cast<size_t>(node)]; }
  // What a binary layer's residual is a concatenation of with itself; node -1 where it is not.
  const Ref& repeated(int node) const { return repeated_[static_cast<size_t>(node)]; }

  const Graph& graph;
  Constants& constants;
  const Kernel& kernel;

 private:
  void infer();
  void count_uses();
  void fuse();
  void fuse_node(int node);
  void fuse_pad(int node, bool max);
  void fuse_repeats(int node);
  bool append(int node, Ref from, int stage, Chain& chain);
  const float* channel_vector(const Call& call, const char* name, const Type& x, bool negative,
                              const char* role);
  void place_outputs();
  void place_parts(int node);
  int& uses(Ref ref) { return uses_[static_cast<size_t>(ref.node)]; }

  Plan& plan_;
  std::vector<Value> values_;
  std::vector<Ref> same_;  // what a node that changes nothing stands for
  std::vector<int> uses_;
  std::vector<Chain> chains_;
  std::vector<Pads> pads_;    // of pools and convolutions: fused pads
  std::vector<Ref> sources_;  // their input without the pad
  std::vector<Ref> repeated_;
  std::vector<std::array<View, 2>> views_;
  std::map<std::pair<int, int>, View> in_rows_;
};

}  // namespace bitkernels::network
