#include "elementwise.h"

#include <algorithm>

#include "parallel.h"

namespace bitkernels {
namespace {

constexpr int64_t kTask = 1 << 16;  // elements, about 5 us of one core

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

// Four floats of any machine's registers.
typedef float Four __attribute__((vector_size(16)));
typedef float FourInMemory __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Places __attribute__((vector_size(16)));

Four four_at(const float* p) { return *reinterpret_cast<const FourInMemory*>(p); }
void four_to(Four v, float* p) { *reinterpret_cast<FourInMemory*>(p) = v; }

template <int A, int B, int C, int D>
Four picked(Four x, Four y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, A, B, C, D);
#else
  return __builtin_shuffle(x, y, Places{A, B, C, D});
#endif
}

void transpose(Four (&v)[4]) {
  const Four a = picked<0, 4, 1, 5>(v[0], v[1]), b = picked<2, 6, 3, 7>(v[0], v[1]);
  const Four c = picked<0, 4, 1, 5>(v[2], v[3]), d = picked<2, 6, 3, 7>(v[2], v[3]);
  v[0] = picked<0, 1, 4, 5>(a, c);
  v[1] = picked<2, 3, 6, 7>(a, c);
  v[2] = picked<0, 1, 4, 5>(b, d);
  v[3] = picked<2, 3, 6, 7>(b, d);
}

// f(first channel, channels, first pixel, end) over blocks of 4 channels and a few cache lines, in
// tasks that own their pixels.
template <class F>
void for_blocks(int64_t channels, int64_t pixels, const F& f) {
  constexpr int64_t kPixels = 64;
  const int64_t grain = 1 + kTask / (kPixels * std::max<int64_t>(channels, 1));
  parallel_for(ceil_div(pixels, kPixels), grain, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(pixels, end * kPixels);
    const int64_t step = channels < 4 ? last : kPixels;
    for (int64_t p = begin * kPixels; p < last; p += step)
      for (int64_t c = 0; c < channels; c += 4)
        f(c, std::min<int64_t>(4, channels - c), p, std::min(last, p + step));
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
  for_blocks(channels, pixels, [=](int64_t c, int64_t width, int64_t p, int64_t end) {
    const float* in = planes + c * plane;
    float* out = rows + c;
    if (width == 4) {
      for (; p + 4 <= end; p += 4) {
        Four v[4];
        for (int i = 0; i < 4; ++i) v[i] = four_at(in + i * plane + p);
        transpose(v);
        for (int i = 0; i < 4; ++i) four_to(v[i], out + (p + i) * row);
      }
    } else if (channels == 3 && row == 3) {  // an image's colours, without gaps
      for (; p + 4 <= end; p += 4) {
        Four v[4] = {};
        for (int i = 0; i < 3; ++i) v[i] = four_at(in + i * plane + p);
        transpose(v);
        four_to(picked<0, 1, 2, 4>(v[0], v[1]), out + p * 3);
        four_to(picked<1, 2, 4, 5>(v[1], v[2]), out + p * 3 + 4);
        four_to(picked<2, 4, 5, 6>(v[2], v[3]), out + p * 3 + 8);
      }
    }
    for (; p < end; ++p)
      for (int64_t i = 0; i < width; ++i) out[p * row + i] = in[i * plane + p];
  });
}

void rows_to_planes(const float* rows, int64_t row, int64_t channels, int64_t pixels, float* planes,
                    int64_t plane) {
  for_blocks(channels, pixels, [=](int64_t c, int64_t width, int64_t p, int64_t end) {
    const float* in = rows + c;
    float* out = planes + c * plane;
    if (width == 4)
      for (; p + 4 <= end; p += 4) {
        Four v[4];
        for (int i = 0; i < 4; ++i) v[i] = four_at(in + (p + i) * row);
        transpose(v);
        for (int i = 0; i < 4; ++i) four_to(v[i], out + i * plane + p);
      }
    for (; p < end; ++p)
      for (int64_t i = 0; i < width; ++i) out[i * plane + p] = in[p * row + i];
  });
}

}  // namespace bitkernels
