// The output of a windowed operation cut where other taps of the window fall inside the image.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitkernels {

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

}  // namespace bitkernels
