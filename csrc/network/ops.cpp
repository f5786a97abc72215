// The table of operators: their schemas, as of PyTorch and bitkernels/ops.
#include "ops.h"

#include <algorithm>
#include <cstdlib>
#include <unordered_map>

#include "emit.h"
#include "infer.h"

namespace bitkernels::network {
namespace {

#define BK_EPILOGUE                                                                      \
  "out_channels:i?=none clamp_min:f?=none clamp_max:f?=none scale:T?=none bias:T?=none " \
  "residual:T?=none shift_in:T?=none slope:T?=none shift_out:T?=none "
#define BK_CONV                                                                       \
  "words:T weight_words:T channels:i stride:I=1 padding:I=0 dilation:I=1 groups:i=1 " \
  "pad_value:i=0 " BK_EPILOGUE
#define BK_LINEAR "words:T weight_words:T channels:i " BK_EPILOGUE

std::vector<Op> table() {
  const char* none = "self:T";
  const char* sum = "self:T other:O alpha:f=1";
  const char* two = "self:T other:O";
  return {
      {"bitkernels.sign_pack.default", "input:T shift:T?=none dim:i=-1", infer_sign_pack,
       emit_sign_pack},
      {"bitkernels.packed_conv2d.default", BK_CONV "dtype:s?=none channels_last:b=true",
       infer_packed_conv, emit_packed_conv, Fuse::kBinary},
      {"bitkernels.packed_conv2d.packed", BK_CONV "sign_shift:T?=none threshold:T?=none",
       infer_packed_conv, emit_packed_conv, Fuse::kBinary},
      {"bitkernels.packed_conv2d.both",
       BK_CONV "dtype:s?=none channels_last:b=true sign_shift:T?=none", infer_packed_conv,
       emit_packed_conv, Fuse::kBinary},
      {"bitkernels.packed_linear.default", BK_LINEAR "dtype:s?=none", infer_packed_linear,
       emit_packed_linear},
      {"bitkernels.packed_linear.packed", BK_LINEAR "sign_shift:T?=none threshold:T?=none",
       infer_packed_linear, emit_packed_linear},
      {"bitkernels.packed_linear.both", BK_LINEAR "dtype:s?=none sign_shift:T?=none",
       infer_packed_linear, emit_packed_linear},
      {"bitkernels.packed_max_pool2d.default",
       "words:T kernel_size:I stride:I=[] padding:I=0 dilation:I=1 ceil_mode:b=false",
       infer_packed_pool, emit_packed_pool},
      {"bitkernels.packed_conv_transpose2d.default",
       "words:T weight_words:T channels:i stride:I=1 padding:I=0 output_padding:I=0 groups:i=1 "
       "dilation:I=1 scale:T?=none bias:T?=none dtype:s?=none channels_last:b=true",
       infer_transposed, emit_transposed},
      {"bitkernels.rprelu.default", "input:T shift_in:T slope:T shift_out:T", infer_rprelu,
       emit_rprelu},
      {"bitkernels.rsign.default", "input:T shift:T estimator:s=approx_sign clip:f?=1 beta:f=5",
       infer_rsign, emit_rsign},
      {"bitkernels.unpack.default", "words:T channels:i dtype:s=float32 dim:i=-1", infer_unpack,
       emit_unpack},

      {"bitkernels.int8_conv2d.default",
       "input:T weight:T scale:T bias:T? steps:f stride:I=1 padding:I=0 dilation:I=1 groups:i=1",
       infer_int8_conv, emit_int8_conv, Fuse::kConv},
      {"bitkernels.int8_linear.default", "input:T weight:T scale:T bias:T? steps:f",
       infer_int8_linear, emit_int8_linear, Fuse::kConv},
      {"aten.conv2d.default",
       "input:T weight:T bias:T?=none stride:I=1 padding:I=0 dilation:I=1 groups:i=1", infer_conv,
       emit_conv, Fuse::kConv},
      {"aten.linear.default", "input:T weight:T bias:T?=none", infer_linear, emit_linear,
       Fuse::kConv},
      {"aten.batch_norm.default",
       "input:T weight:T? bias:T? running_mean:T? running_var:T? training:b momentum:f eps:f "
       "cudnn_enabled:b",
       infer_norm, emit_nothing, Fuse::kNorm},
      {"aten.max_pool2d.default",
       "self:T kernel_size:I stride:I=[] padding:I=0 dilation:I=1 ceil_mode:b=false",
       infer_max_pool, emit_max_pool, Fuse::kMaxPool},
      {"aten.avg_pool2d.default",
       "self:T kernel_size:I stride:I=[] padding:I=0 ceil_mode:b=false count_include_pad:b=true "
       "divisor_override:i?=none",
       infer_avg_pool, emit_avg_pool, Fuse::kAvgPool},
      {"aten.adaptive_avg_pool2d.default", "self:T output_size:I", infer_adaptive_pool,
       emit_adaptive_pool},
      {"aten.mean.dim", "self:T dim:I? keepdim:b=false dtype:s?=none", infer_mean, emit_mean},
      {"aten.softmax.int", "self:T dim:i dtype:s?=none", infer_softmax, emit_softmax},
      {"aten.pad.default", "self:T pad:I mode:s=constant value:f?=none", infer_pad, emit_pad},
      {"aten.constant_pad_nd.default", "self:T pad:I value:f?=0", infer_pad, emit_pad},

      {"aten.relu.default", none, infer_same, emit_nothing, Fuse::kBounds},
      {"aten.relu6.default", none, infer_same, emit_nothing, Fuse::kBounds},
      {"aten.clamp.default", "self:T min:f?=none max:f?=none", infer_same, emit_nothing,
       Fuse::kBounds},
      {"aten.clamp_min.default", "self:T min:f", infer_same, emit_nothing, Fuse::kBounds},
      {"aten.hardtanh.default", "self:T min_val:f=-1 max_val:f=1", infer_same, emit_nothing,
       Fuse::kBounds},
      {"aten.prelu.default", "self:T weight:T", infer_prelu, emit_nothing, Fuse::kSlope},
      {"aten.leaky_relu.default", "self:T negative_slope:f=0.01", infer_same, emit_nothing,
       Fuse::kSlope},
      {"aten.sigmoid.default", none, infer_same, emit_sigmoid},
      {"aten.round.default", none, infer_same, emit_unary},
      {"aten.neg.default", none, infer_same, emit_unary},
      {"aten.abs.default", none, infer_same, emit_unary},
      {"aten.exp.default", none, infer_same, emit_unary},
      {"aten.sqrt.default", none, infer_same, emit_unary},
      {"aten.tanh.default", none, infer_same, emit_unary},
      {"aten.silu.default", none, infer_same, emit_unary},
      {"aten.hardsigmoid.default", none, infer_same, emit_unary},
      {"aten.hardswish.default", none, infer_same, emit_unary},
      {"aten.elu.default", "self:T alpha:f=1 scale:f=1 input_scale:f=1", infer_same, emit_unary},
      {"aten.gelu.default", "self:T approximate:s=none", infer_gelu, emit_unary},
      {"aten.add.Tensor", sum, infer_binary, emit_binary, Fuse::kSum},
      {"aten.add.Scalar", sum, infer_binary, emit_binary, Fuse::kSum},
      {"aten.sub.Tensor", sum, infer_binary, emit_binary, Fuse::kSum},
      {"aten.sub.Scalar", sum, infer_binary, emit_binary, Fuse::kSum},
      {"aten.mul.Tensor", two, infer_binary, emit_binary, Fuse::kProduct},
      {"aten.mul.Scalar", two, infer_binary, emit_binary, Fuse::kProduct},
      {"aten.div.Tensor", two, infer_binary, emit_binary},
      {"aten.div.Scalar", two, infer_binary, emit_binary},
      {"aten.ge.Scalar", two, infer_compare, emit_binary},
      {"aten.le.Scalar", two, infer_compare, emit_binary},
      {"aten.gt.Scalar", two, infer_compare, emit_binary},
      {"aten.lt.Scalar", two, infer_compare, emit_binary},
      {"aten.__and__.Tensor", "self:T other:T", infer_and, emit_binary},
      {"aten.where.ScalarOther", "condition:T self:T other:f", infer_where, emit_where},

      {"aten.cat.default", "tensors:L dim:i=0", infer_cat, emit_cat},
      {"aten.slice.Tensor", "self:T dim:i=0 start:i?=none end:i?=none step:i=1", infer_slice,
       emit_view},
      {"aten.flatten.using_ints", "self:T start_dim:i=0 end_dim:i=-1", infer_flatten, emit_view},
      {"aten.reshape.default", "self:T shape:I", infer_reshape, emit_view},
      {"aten.view.default", "self:T shape:I", infer_reshape, emit_view},
      {"aten.permute.default", "self:T dims:I", infer_permute, emit_view},
      {"aten.transpose.int", "self:T dim0:i dim1:i", infer_transpose, emit_view},
      {"aten.unsqueeze.default", "self:T dim:i", infer_unsqueeze, emit_view},
      {"aten.squeeze.default", none, infer_squeeze, emit_view},
      {"aten.squeeze.dim", "self:T dim:I", infer_squeeze, emit_view},
      {"aten.squeeze.dims", "self:T dim:I", infer_squeeze, emit_view},
      {"aten.contiguous.default", "self:T memory_format:s=contiguous_format", infer_copy,
       emit_nothing, Fuse::kSame},
      {"aten.clone.default", "self:T memory_format:s?=none", infer_copy, emit_nothing, Fuse::kSame},
      {"aten.alias.default", none, infer_copy, emit_nothing, Fuse::kSame},
      {"aten.detach.default", none, infer_copy, emit_nothing, Fuse::kSame},
      {"aten.to.dtype", "self:T dtype:s non_blocking:b=false copy:b=false memory_format:s?=none",
       infer_copy, emit_nothing, Fuse::kSame},

      {"aten.sym_size.int", "self:T dim:i", infer_size, emit_nothing},
      {"size.getitem", "self:T index:i", infer_getitem, emit_nothing, Fuse::kSame},
      {"size.add", "a:i b:i", infer_integer, emit_nothing},
      {"size.sub", "a:i b:i", infer_integer, emit_nothing},
      {"size.mul", "a:i b:i", infer_integer, emit_nothing},
      {"size.floordiv", "a:i b:i", infer_integer, emit_nothing},
      {"size.mod", "a:i b:i", infer_integer, emit_nothing},
  };
}

// "name:kind", "?" behind a kind that None is one of, "=" and a default.
Param param_of(const std::string& word) {
  const size_t colon = word.find(':'), equals = word.find('=');
  Param p = {word.substr(0, colon),
             word[colon + 1],
             word[colon + 2] == '?',
             equals == std::string::npos,
             {}};
  if (p.required) return p;
  const std::string value = word.substr(equals + 1);
  Arg& arg = p.fallback;
  if (value == "none") {
    arg.kind = Arg::kNone;
  } else if (value == "[]") {
    arg.kind = Arg::kList;
  } else if (value == "true" || value == "false") {
    arg.kind = Arg::kBool;
    arg.integer = value == "true";
  } else if (p.kind == 's') {
    arg.kind = Arg::kName;
    arg.name = value;
  } else {
    arg.kind = p.kind == 'f' ? Arg::kReal : Arg::kInt;
    arg.real = std::strtod(value.c_str(), nullptr);
    arg.integer = static_cast<int64_t>(arg.real);
  }
  return p;
}

}  // namespace

const Op* find_op(const std::string& name) {
  static const std::unordered_map<std::string, Op> ops = [] {
    std::unordered_map<std::string, Op> map;
    for (Op op : table()) {
      const std::string schema = op.schema;
      for (size_t at = 0, end; at < schema.size(); at = end + 1) {
        end = std::min(schema.find(' ', at), schema.size());
        if (end > at) op.params.push_back(param_of(schema.substr(at, end - at)));
      }
      map.emplace(op.name, std::move(op));
    }
    return map;
  }();
  const auto found = ops.find(name);
  return found == ops.end() ? nullptr : &found->second;
}

}  // namespace bitkernels::network
