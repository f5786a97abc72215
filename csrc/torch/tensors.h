// Tensors as the engine sees them: allocation, dense memory, per-channel vectors.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"

namespace bitkernels {

using Sizes = std::vector<int64_t>;
using OptTensor = std::optional<Tensor>;
using OptInt = std::optional<int64_t>;
using OptFloat = std::optional<double>;
using OptType = std::optional<ScalarType>;

inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType type) {
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(
          static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
          aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(
        text("bitkernels: no memory for ", name_of(type), " of shape ", tuple_text(sizes)));
  return Tensor(handle);
}

inline Tensor empty(const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(sizes, strides, type);
}

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor copy = empty({t.sizes().begin(), t.sizes().end()}, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

inline const uint32_t* words_of(const Tensor& t) {
  return static_cast<const uint32_t*>(t.const_data_ptr());
}
inline uint32_t* mutable_words(const Tensor& t) {
  return static_cast<uint32_t*>(t.mutable_data_ptr());
}

// A vector over the channels, or one a sample, in the type the kernels compute in, readable 32 past
// its end.
template <class W>
std::vector<W> widened(const Tensor& given) {
  const Tensor t = given.dim() == 1 ? given : dense(given);
  const int64_t n = t.numel(), step = t.dim() == 1 ? t.stride(0) : 1;
  std::vector<W> out(n + 32, W(0));
  const void* p = t.const_data_ptr();
  for (int64_t i = 0; i < n; ++i) switch (t.scalar_type()) {
      case ScalarType::Double:
        out[i] = static_cast<W>(static_cast<const double*>(p)[i * step]);
        break;
      case ScalarType::Half:
        out[i] = static_cast<float>(static_cast<const torch::headeronly::Half*>(p)[i * step]);
        break;
      case ScalarType::BFloat16:
        out[i] = static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(p)[i * step]);
        break;
      default:
        out[i] = static_cast<const float*>(p)[i * step];
    }
  return out;
}

class WideVector {
 public:
  WideVector(const OptTensor& t, bool wide) {
    if (!t) return;
    if (wide)
      data_ = (doubles_ = widened<double>(*t)).data();
    else
      data_ = (floats_ = widened<float>(*t)).data();
  }
  const void* get() const { return data_; }
  const float* floats() const { return static_cast<const float*>(data_); }

 private:
  std::vector<float> floats_;
  std::vector<double> doubles_;
  const void* data_ = nullptr;
};

// A tensor seen as (outer, channels, inner) around `dim`, in the memory order it has.
struct Around {
  Tensor tensor;
  int64_t outer, channels, inner;
  bool innermost;  // the channels, the rest dense: the strides are the tensor's
};

inline Around around(const Tensor& t, int64_t dim) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t channels = sizes[dim], n = t.dim();
  bool innermost = channels == 1 || strides[dim] == 1;
  int64_t step = channels, outer = 1, inner = 1;
  for (int64_t i = n - 1; i >= 0; --i) {
    if (i == dim) continue;
    if (sizes[i] != 1 && strides[i] != step) innermost = false;
    step *= sizes[i];
    (i < dim ? outer : inner) *= sizes[i];
  }
  if (innermost) return {t, outer * inner, channels, 1, true};
  return {dense(t), outer, channels, inner, false};
}

inline Tensor empty_rows(const Tensor& like, ScalarType type) {
  const int64_t c = like.size(1), h = like.size(2), w = like.size(3);
  return empty_strided({like.size(0), c, h, w}, {c * h * w, 1, w * c, c}, type);
}

// The tensor in channels-last memory, a copy where it is not.
inline Tensor as_rows(const Tensor& t) {
  const Around x = around(t, 1);
  if (x.inner == 1) return x.tensor;
  Tensor copy = empty_rows(t, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

inline Sizes packed_shape(const Tensor& t, int64_t dim) {
  Sizes shape;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (i != dim) shape.push_back(t.size(i));
  shape.push_back(word_count(t.size(dim)));
  return shape;
}

// An empty tensor like it. Contiguous is also one whose strides say something else of sizes 0
// and 1.
inline Tensor empty_around(const Around& x) {
  const auto sizes = x.tensor.sizes(), strides = x.tensor.strides();
  const Sizes shape(sizes.begin(), sizes.end());
  if (!x.innermost) return empty(shape, x.tensor.scalar_type());
  return empty_strided(shape, {strides.begin(), strides.end()}, x.tensor.scalar_type());
}

}  // namespace bitkernels
