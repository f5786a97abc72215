#include "elementwise.h"

#include <algorithm>

#include "parallel.h"

namespace bitkernels {
namespace {

constexpr int64_t kTask = 1 << 15;  // elements, about 10 us of one core

// Rows that lie next to each other are one row where no vector of channels is used.
RowsJob joined(RowsJob job) {
  const int64_t c = job.channels;
  const bool vectors = job.scale || job.shift || job.slope;
  const bool dense = job.x_row == c && job.out_row == c && (!job.y || job.y_row == c);
  if (vectors || !dense || job.rows < 2) return job;
  job.channels = job.rows * c;
  job.rows = 1;
  return job;
}

void run(void (*kernel)(const RowsJob&), const RowsJob& given) {
  const RowsJob all = joined(given);
  if (all.rows == 1) {  // cut within the row
    const int64_t pieces = ceil_div(all.channels, 16);
    return parallel_for(pieces, kTask / 16, [&](int64_t begin, int64_t end) {
      RowsJob job = all;
      const int64_t c = 16 * begin;
      job.channels = std::min(all.channels, 16 * end) - c;
      job.x += c;
      job.out += c;
      for (const float** vector : {&job.y, &job.scale, &job.shift, &job.slope})
        if (*vector) *vector += c;
      kernel(job);
    });
  }
  const int64_t grain = 1 + kTask / std::max<int64_t>(all.channels, 1);
  parallel_for(all.rows, grain, [&](int64_t begin, int64_t end) {
    RowsJob job = all;
    job.rows = end - begin;
    job.x += begin * job.x_row;
    job.out += begin * job.out_row;
    if (job.y) job.y += begin * job.y_row;
    kernel(job);
  });
}

}  // namespace

void affine_rows(const Kernel& kernel, const RowsJob& job) { run(kernel.affine_run, job); }
void multiply_rows(const Kernel& kernel, const RowsJob& given) {
  RowsJob job = given;
  job.scale = job.shift = job.slope = nullptr;
  run(kernel.multiply_run, job);
}
void sigmoid_rows(const Kernel& kernel, const RowsJob& given) {
  RowsJob job = given;
  job.y = job.scale = job.shift = job.slope = nullptr;
  run(kernel.sigmoid_run, job);
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
