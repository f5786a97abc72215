// Elementwise work on views of any strides, for what the engine has no kernel of its own.
#pragma once
#include <algorithm>

#include "cpu/parallel.h"
#include "values.h"

namespace bitkernels::network {

// Sizes with the strides of an output and two operands in them; dimensions that all three pass in
// one go are one.
struct Strided {
  Sizes sizes, out, a, b;
};

// Strides of a view as of a larger shape: 0 where it has one element for many.
inline Sizes broadcast_strides(const View& v, const Sizes& sizes) {
  Sizes strides;
  for (int i = 0; i < sizes.rank; ++i) {
    const int own = i - sizes.rank + v.sizes.rank;
    strides.push(own < 0 || v.sizes[own] == 1 ? 0 : v.strides[own]);
  }
  return strides;
}

inline Strided strided(const View& out, const View& a, const View& b) {
  const Sizes sa = broadcast_strides(a, out.sizes), sb = broadcast_strides(b, out.sizes);
  int order[kMostRank];
  int rank = 0;
  for (int i = 0; i < out.sizes.rank; ++i)
    if (out.sizes[i] != 1) order[rank++] = i;
  std::stable_sort(order, order + rank,
                   [&](int x, int y) { return out.strides[x] > out.strides[y]; });
  Strided s;
  for (int i = 0; i < rank; ++i) {
    const int d = order[i], last = s.sizes.rank - 1;
    const int64_t n = out.sizes[d];
    if (last >= 0 && s.out[last] == n * out.strides[d] && s.a[last] == n * sa[d] &&
        s.b[last] == n * sb[d]) {
      s.sizes[last] *= n;
      s.out[last] = out.strides[d], s.a[last] = sa[d], s.b[last] = sb[d];
    } else {
      s.sizes.push(n);
      s.out.push(out.strides[d]), s.a.push(sa[d]), s.b.push(sb[d]);
    }
  }
  if (s.sizes.rank == 0) {
    s.sizes.push(1);
    s.out.push(1), s.a.push(0), s.b.push(0);
  }
  return s;
}

// out[i] = f(a[i], b[i]).
template <class Out, class A, class B, class F>
void for_each(const Strided& s, Out* out, const A* a, const B* b, const F& f) {
  constexpr int64_t kPiece = 4096;
  const int last = s.sizes.rank - 1;
  const int64_t inner = s.sizes[last], pieces = (inner + kPiece - 1) / kPiece;
  int64_t outer = 1;
  for (int i = 0; i < last; ++i) outer *= s.sizes[i];
  const int64_t so = s.out[last], sa = s.a[last], sb = s.b[last];
  const int64_t grain = 1 + 4 * kPiece / std::max<int64_t>(1, std::min(inner, kPiece));
  parallel_for(outer * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece, n = std::min(kPiece, inner - first);
      int64_t rest = i / pieces, at = first * so, at_a = first * sa, at_b = first * sb;
      for (int d = last - 1; d >= 0; --d) {
        const int64_t j = rest % s.sizes[d];
        rest /= s.sizes[d];
        at += j * s.out[d], at_a += j * s.a[d], at_b += j * s.b[d];
      }
      Out* to = out + at;
      const A* x = a + at_a;
      const B* y = b + at_b;
      if (so == 1 && sa == 1 && sb == 1)
        for (int64_t j = 0; j < n; ++j) to[j] = f(x[j], y[j]);
      else if (so == 1 && sa == 1 && sb == 0)
        for (int64_t j = 0; j < n; ++j) to[j] = f(x[j], *y);
      else
        for (int64_t j = 0; j < n; ++j) to[j * so] = f(x[j * sa], y[j * sb]);
    }
  });
}

}  // namespace bitkernels::network
