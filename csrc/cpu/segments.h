// The output of a windowed operation cut where other taps of the window fall inside the image.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitkernels {

struct Box {
  int64_t y0, y1, x0, x1;
};

// Output positions [begin, end) whose windows contain exactly the taps [tap_begin, tap_end).
struct Segment {
  int64_t begin, end, tap_begin, tap_end;
};

inline std::vector<Segment> segments(int64_t out, int64_t size, int64_t taps, int64_t stride,
                                     int64_t pad, int64_t dilation) {
  std::vector<Segment> list;
  for (int64_t o = 0; o < out; ++o) {
    const int64_t origin = o * stride - pad;
    const int64_t lo = std::min(taps, origin < 0 ? ceil_div(-origin, dilation) : 0);
    const int64_t last = size - 1 - origin;  // distance from the origin to the last pixel
    const int64_t hi = last < 0 ? lo : std::max(lo, std::min(taps, last / dilation + 1));
    if (!list.empty() && list.back().tap_begin == lo && list.back().tap_end == hi)
      list.back().end = o + 1;
    else
      list.push_back({o, o + 1, lo, hi});
  }
  return list;
}

// f(rows, columns, y, x, dy, dx, count) for runs of `count` pixels of `box`, from (y, x) on in
// steps of (dy, dx), in whose windows the same taps fall inside. Rectangles of few columns go by
// columns.
template <class F>
void for_runs(const std::vector<Segment>& rows, const std::vector<Segment>& columns, const Box& box,
              const F& f) {
  constexpr int64_t kFewColumns = 4;
  for (const Segment& ys : rows)
    for (const Segment& xs : columns) {
      const int64_t y0 = std::max(box.y0, ys.begin), y1 = std::min(box.y1, ys.end);
      const int64_t x0 = std::max(box.x0, xs.begin), x1 = std::min(box.x1, xs.end);
      if (y0 >= y1 || x0 >= x1) continue;
      if (x1 - x0 >= std::min(kFewColumns, y1 - y0)) {
        for (int64_t y = y0; y < y1; ++y) f(ys, xs, y, x0, 0, 1, x1 - x0);
      } else {
        for (int64_t x = x0; x < x1; ++x) f(ys, xs, y0, x, 1, 0, y1 - y0);
      }
    }
}

}  // namespace bitkernels
