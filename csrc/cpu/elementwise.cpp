#include "elementwise.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace bitkernels {
namespace {

// f(x, y, out, channel): y null where there is none.
template <class F>
void for_elements(const RowsJob& job, const F& f) {
  const int64_t each = 1 + (1 << 15) / std::max<int64_t>(job.channels, 1);
  parallel_for(job.rows, each, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < job.channels; ++c)
        f(job.x[i * job.x_row + c], job.y ? job.y + i * job.y_row + c : nullptr,
          job.out[i * job.out_row + c], c);
  });
}

}  // namespace

void affine_rows(const Kernel&, const RowsJob& job) {
  for_elements(job, [&](float v, const float* y, float& out, int64_t c) {
    if (job.scale) v *= job.scale[c];
    if (job.shift) v += job.shift[c];
    if (y) v += *y;
    if (job.slope && !(v >= 0)) v *= job.slope[c];
    out = v < job.lo ? job.lo : v > job.hi ? job.hi : v;
  });
}

void multiply_rows(const Kernel&, const RowsJob& job) {
  for_elements(job, [&](float v, const float* y, float& out, int64_t) { out = v * *y; });
}

void sigmoid_rows(const Kernel&, const RowsJob& job) {
  for_elements(job, [&](float v, const float*, float& out, int64_t) {
    const float e = std::exp(-std::fabs(v));
    out = v < 0 ? e / (1 + e) : 1 / (1 + e);
  });
}

void planes_to_rows(const float* planes, int64_t plane, int64_t channels, int64_t pixels,
                    float* rows, int64_t row) {
  parallel_for(pixels, 1 + (1 << 14) / std::max<int64_t>(channels, 1), [&](int64_t p, int64_t end) {
    for (; p < end; ++p)
      for (int64_t c = 0; c < channels; ++c) rows[p * row + c] = planes[c * plane + p];
  });
}

void rows_to_planes(const float* rows, int64_t row, int64_t channels, int64_t pixels, float* planes,
                    int64_t plane) {
  parallel_for(channels, 1 + (1 << 14) / std::max<int64_t>(pixels, 1), [&](int64_t c, int64_t end) {
    for (; c < end; ++c)
      for (int64_t p = 0; p < pixels; ++p) planes[c * plane + p] = rows[p * row + c];
  });
}

}  // namespace bitkernels
