// What stands for tensors while a network is planned: types, and views of planned memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "error.h"

namespace bitkernels::network {

constexpr int kMostRank = 8;

// As bk_dtype; weights alone are int8.
enum class Element : int32_t { kFloat32 = 0, kInt32 = 1, kInt64 = 2, kBool = 3, kInt8 = 4 };
constexpr const char* kElementNames[] = {"float32", "int32", "int64", "bool", "int8"};
inline int64_t bytes_of(Element e) {
  return e == Element::kInt64 ? 8 : e == Element::kBool || e == Element::kInt8 ? 1 : 4;
}
inline const char* name_of(Element e) { return kElementNames[static_cast<int>(e)]; }

struct Sizes {
  int rank = 0;
  int64_t values[kMostRank] = {};

  Sizes() = default;
  Sizes(std::initializer_list<int64_t> list) {
    for (int64_t n : list) push(n);
  }
  void push(int64_t n) {
    if (rank == kMostRank) fail("a tensor of more than ", kMostRank, " dimensions");
    values[rank++] = n;
  }
  void insert(int at, int64_t n) {
    push(n);
    std::rotate(values + at, values + rank - 1, values + rank);
  }
  void erase(int at) {
    std::copy(values + at + 1, values + rank, values + at);
    --rank;
  }
  int64_t& operator[](int i) { return values[i]; }
  int64_t operator[](int i) const { return values[i]; }
  int64_t back() const { return values[rank - 1]; }
  const int64_t* begin() const { return values; }
  const int64_t* end() const { return values + rank; }
  bool operator==(const Sizes& o) const {
    return rank == o.rank && std::equal(begin(), end(), o.begin());
  }
  bool operator!=(const Sizes& o) const { return !(*this == o); }
  int64_t count() const {
    int64_t n = 1;
    for (int64_t v : *this) n = times(n, v);
    return n;
  }
};

inline std::string text_of(const Sizes& sizes) {
  std::string out = "(";
  for (int i = 0; i < sizes.rank; ++i) out += text(i ? ", " : "", sizes[i]);
  return out + (sizes.rank == 1 ? ",)" : ")");
}

struct Type {
  Element element = Element::kFloat32;
  Sizes sizes;

  bool operator==(const Type& o) const { return element == o.element && sizes == o.sizes; }
  int64_t bytes() const { return times(sizes.count(), bytes_of(element)); }
};
inline std::string text_of(const Type& t) {
  return text(name_of(t.element), " of shape ", text_of(t.sizes));
}

// The dimension that is innermost in memory of our own: channels of real images, else the last.
inline int channel_dim(const Type& t) {
  const bool image = t.element == Element::kFloat32 || t.element == Element::kBool;
  return image && t.sizes.rank == 4 ? 1 : t.sizes.rank - 1;
}

// A place in memory that is known when the network runs.
struct Where {
  int buffer = -1;
  int64_t offset = 0;  // bytes
};

struct View : Type {
  Where where;
  Sizes strides;  // elements
};

// Strides of a tensor without gaps, channels innermost.
inline Sizes dense_strides(const Type& t) {
  Sizes strides = t.sizes;
  int64_t step = 1;
  const int inner = channel_dim(t);
  const auto next = [&](int i) {
    strides[i] = step;
    step = times(step, std::max<int64_t>(t.sizes[i], 1));
  };
  if (t.sizes.rank > 0) next(inner);
  for (int i = t.sizes.rank - 1; i >= 0; --i)
    if (i != inner) next(i);
  return strides;
}

// The same for images of our own, but that rows of channels two or fewer of which fill a page are a
// cache line further apart. The first-level cache keeps 8 lines of one place of a page (Zen 4:
// ReActNet-A's epilogue of 1024 channels took 17 cycles for 16 outputs in place of 7), and a load
// waits for the last store to its place (1x1 layers of 512 channels take 62 us in place of 57).
constexpr int64_t kHalfPage = 2048, kLine = 64;
inline Sizes spread_strides(const Type& t) {
  Sizes strides = dense_strides(t);
  if (t.element != Element::kFloat32 || t.sizes.rank != 4 || t.sizes[1] * 4 % kHalfPage != 0 ||
      t.sizes[1] == 0)
    return strides;
  const int64_t row = t.sizes[1];
  for (int i = 0; i < t.sizes.rank; ++i)
    if (i != 1) strides[i] = times(strides[i] / row, row + kLine / 4);
  return strides;
}

// Bytes from a view's first element to behind its last.
inline int64_t reach_of(const Type& t, const Sizes& strides) {
  int64_t last = 0;
  for (int i = 0; i < t.sizes.rank; ++i) {
    if (t.sizes[i] == 0) return 0;
    last = plus(last, times(t.sizes[i] - 1, strides[i]));
  }
  return times(plus(last, 1), bytes_of(t.element));
}

// A view as rows of channels next to each other, `row` elements apart.
struct Rows {
  int64_t count, channels, row;
};

inline std::optional<Rows> rows_of(const View& v) {
  const int inner = channel_dim(v);
  Rows rows = {1, v.sizes.rank ? v.sizes[inner] : 1, 0};
  if (rows.channels > 1 && v.strides[inner] != 1) return std::nullopt;
  for (int i = v.sizes.rank - 1; i >= 0; --i) {
    if (i == inner || v.sizes[i] == 1) continue;
    if (rows.count == 1) rows.row = v.strides[i];
    if (v.strides[i] != rows.row * rows.count) return std::nullopt;
    rows.count *= v.sizes[i];
  }
  if (rows.count == 1) rows.row = rows.channels;
  return rows;
}

inline bool is_dense(const View& v) {
  const std::optional<Rows> rows = rows_of(v);
  return rows && rows->row == rows->channels;
}

}  // namespace bitkernels::network
