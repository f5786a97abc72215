// The operators that this engine has: parameters, shapes, and how each becomes steps.
#pragma once
#include <string>
#include <vector>

#include "graph.h"

namespace bitkernels::network {

class Lowering;
struct Chain;

// What may be asked of an argument before any sizes are known.
struct Param {
  std::string name;
  char kind;      // T tensor, O tensor or number, L tensors, i, f, b, I integers, s a name
  bool optional;  // may be None
  bool required;  // has no default
  Arg fallback;
};

// What the fusing pass may do with an operator's node.
enum class Fuse {
  kNo,
  kSame,
  kBinary,
  kConv,
  kAvgPool,
  kMaxPool,
  kNorm,
  kSum,
  kProduct,
  kSlope,
  kBounds
};

struct Op {
  const char* name;
  const char* schema;  // "input:T bias:T? stride:I=1 ..."
  Value (*infer)(const Call&);
  void (*emit)(Lowering&, const Call&, int node);
  Fuse fuse = Fuse::kNo;
  std::vector<Param> params = {};
};

// Null where this engine has none of that name.
const Op* find_op(const std::string& name);

// Whether a call is of the overload of that name, as "both".
inline bool is_overload(const Call& call, const std::string& overload) {
  const std::string name = call.node.op->name;
  return name.substr(name.rfind('.') + 1) == overload;
}

// Geometry that inference and emission share.
struct Window {
  int64_t kh, kw, stride_h, stride_w, top, bottom, left, right, dilation_h, dilation_w;
  int64_t out_h, out_w;
};
// Zeros that a pad in front of a layer has become: sizes added to the window's own padding.
struct Pads {
  int64_t left = 0, right = 0, top = 0, bottom = 0;
  bool any() const { return left || right || top || bottom; }
};
Window conv_window(const Call& call, const Pads& pads = {});  // aten.conv2d
Window packed_window(const Call& call);                       // packed_conv2d*
Window int8_window(const Call& call, const Pads& pads = {});  // int8_conv2d
// With padding as one, two or four integers, of a filter that the argument `weight` is.
Window padded_window(const Call& call, const char* weight, int64_t height, int64_t width,
                     int64_t kh, int64_t kw);
Window pool_window(const Call& call, int first, const Pads& = {});  // first: the height's dimension
std::vector<int64_t> pads_of(const Call& call, const Type& input);  // aten.pad: each >= 0
std::vector<int> reduced_dims(const Call& call, const Type& input);  // aten.mean.dim, sorted
Sizes broadcast(const Call& call, const Type& a, const Type& b);
std::pair<int64_t, int64_t> slice_of(const Call& call, const Type& input);  // start, and length

}  // namespace bitkernels::network
