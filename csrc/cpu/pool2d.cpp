// Windows are cut as those of convolutions: taps outside the image are not visited.
#include "pool2d.h"

#include <algorithm>

#include "parallel.h"
#include "segments.h"

namespace bitkernels {
namespace {

constexpr int64_t kTaps = 1 << 17;  // elements read by a task, about 5 us of one core

RealRun run_of(const RealPool& p) {
  RealRun r;
  r.a_ky = p.dilation_h * p.width * p.in_pixel;
  r.a_kx = p.dilation_w * p.in_pixel;
  r.channels = p.channels;
  return r;
}

// f(begin, end) over the rows of all output images.
template <class F>
void for_out_rows(const RealPool& p, int64_t taps, const F& f) {
  const int64_t work = p.out_w * p.channels * taps;
  parallel_for(p.batch * p.out_h, 1 + kTaps / std::max<int64_t>(work, 1), f);
}

// f(run, y, x) completes a run of windows and runs it; (y, x) is the first one's output pixel.
template <class F>
void for_windows(const RealPool& p, const F& f) {
  const Segments rows(p.out_h, p.height, p.kh, p.stride_h, p.top, p.dilation_h);
  const Segments columns(p.out_w, p.width, p.kw, p.stride_w, p.left, p.dilation_w);
  const int64_t a_row = p.width * p.in_pixel, out_row = p.out_w * p.out_pixel;
  for_out_rows(p, p.kh * p.kw, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin / p.out_h; n * p.out_h < end; ++n) {
      const Box box = {std::max<int64_t>(0, begin - n * p.out_h),
                       std::min(p.out_h, end - n * p.out_h), 0, p.out_w};
      for_runs(rows, columns, box,
               [&](const Segment& ys, const Segment& xs, int64_t y, int64_t x, int64_t dy,
                   int64_t dx, int64_t count) {
                 RealRun r = run_of(p);
                 r.ky = ys.tap_end - ys.tap_begin;
                 r.kx = r.ky ? xs.tap_end - xs.tap_begin : 0;
                 if (!r.kx) r.ky = 0;
                 r.a = p.input + n * p.height * a_row;
                 if (r.ky)
                   r.a += (y * p.stride_h - p.top + ys.tap_begin * p.dilation_h) * a_row +
                          (x * p.stride_w - p.left + xs.tap_begin * p.dilation_w) * p.in_pixel;
                 r.a_pixel = dy * p.stride_h * a_row + dx * p.stride_w * p.in_pixel;
                 r.out = p.out + (n * p.out_h + y) * out_row + x * p.out_pixel;
                 r.out_pixel = dy * out_row + dx * p.out_pixel;
                 r.pixels = count;
                 f(r, y, x);
               });
    }
  });
}

}  // namespace

void max_pool2d(const Kernel& kernel, const RealPool& p) {
  for_windows(p, [&](const RealRun& r, int64_t, int64_t) { kernel.max_run(r); });
}

void avg_pool2d(const Kernel& kernel, const RealPool& p, bool count_padding, int64_t divisor) {
  for_windows(p, [&](RealRun& r, int64_t y, int64_t x) {
    // Windows of a run that the image or its padding cuts differ in their taps, so all are alike.
    const int64_t y0 = y * p.stride_h - p.top, x0 = x * p.stride_w - p.left;
    const int64_t padded = (std::min(y0 + p.kh, p.height + p.bottom) - y0) *
                           (std::min(x0 + p.kw, p.width + p.right) - x0);
    const int64_t taps = r.ky * r.kx;
    const int64_t count = !taps ? 1 : divisor ? divisor : count_padding ? padded : taps;
    r.divisor = static_cast<float>(count);
    kernel.mean_run(r);
  });
}

void adaptive_avg_pool2d(const Kernel& kernel, const RealPool& given) {
  RealPool p = given;
  p.dilation_h = p.dilation_w = 1;
  const int64_t taps = ceil_div(p.height, std::max<int64_t>(p.out_h, 1)) *
                       ceil_div(p.width, std::max<int64_t>(p.out_w, 1));
  for_out_rows(p, taps, [&](int64_t begin, int64_t end) {
    RealRun r = run_of(p);
    r.pixels = 1;
    for (int64_t i = begin * p.out_w; i < end * p.out_w; ++i) {
      const int64_t x = i % p.out_w, y = i / p.out_w % p.out_h, n = i / p.out_w / p.out_h;
      const int64_t y0 = y * p.height / p.out_h, x0 = x * p.width / p.out_w;
      r.ky = ceil_div((y + 1) * p.height, p.out_h) - y0;
      r.kx = ceil_div((x + 1) * p.width, p.out_w) - x0;
      r.divisor = static_cast<float>(r.ky * r.kx);
      r.a = p.input + ((n * p.height + y0) * p.width + x0) * p.in_pixel;
      r.out = p.out + i * p.out_pixel;
      kernel.mean_run(r);
    }
  });
}

}  // namespace bitkernels
