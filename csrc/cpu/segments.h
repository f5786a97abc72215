// The output of a windowed operation cut where other taps of the window fall inside the image.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace bitkernels {

struct Box {
  int64_t y0, y1, x0, x1;
};

// Output positions [begin, end) whose windows contain exactly the taps [tap_begin, tap_end).
struct Segment {
  int64_t begin, end, tap_begin, tap_end;
};

// One axis of an image: a segment of whole windows, each position before and after one of its own.
class Segments {
 public:
  Segments(int64_t out, int64_t size, int64_t taps, int64_t stride, int64_t pad, int64_t dilation)
      : size_(size), taps_(taps), stride_(stride), pad_(pad), dilation_(dilation) {
    const int64_t last = size - 1 - (taps - 1) * dilation + pad;  // of origins of whole windows
    whole_begin_ = ceil_div(std::max<int64_t>(pad, 0), stride);
    whole_end_ = std::min(out, last < 0 ? 0 : last / stride + 1);
  }
  // The segment of position `o`, from there on.
  Segment at(int64_t o) const {
    if (o >= whole_begin_ && o < whole_end_) return {o, whole_end_, 0, taps_};
    const int64_t origin = o * stride_ - pad_, last = size_ - 1 - origin;
    const int64_t lo = std::min(taps_, origin < 0 ? ceil_div(-origin, dilation_) : 0);
    const int64_t hi = last < 0 ? lo : std::max(lo, std::min(taps_, last / dilation_ + 1));
    return {o, o + 1, lo, hi};
  }

 private:
  int64_t size_, taps_, stride_, pad_, dilation_, whole_begin_, whole_end_;
};

// f(rows, columns, y, x, dy, dx, count) for runs of `count` pixels of `box`, from (y, x) on in
// steps of (dy, dx), in whose windows the same taps fall inside. Rectangles of few columns go by
// columns.
template <class F>
void for_runs(const Segments& rows, const Segments& columns, const Box& box, const F& f) {
  constexpr int64_t kFewColumns = 4;
  for (int64_t y0 = box.y0, y1; y0 < box.y1; y0 = y1) {
    const Segment ys = rows.at(y0);
    y1 = std::min(box.y1, ys.end);
    for (int64_t x0 = box.x0, x1; x0 < box.x1; x0 = x1) {
      const Segment xs = columns.at(x0);
      x1 = std::min(box.x1, xs.end);
      if (x1 - x0 >= std::min(kFewColumns, y1 - y0)) {
        for (int64_t y = y0; y < y1; ++y) f(ys, xs, y, x0, 0, 1, x1 - x0);
      } else {
        for (int64_t x = x0; x < x1; ++x) f(ys, xs, y0, x, 1, 0, y1 - y0);
      }
    }
  }
}

}  // namespace bitkernels
