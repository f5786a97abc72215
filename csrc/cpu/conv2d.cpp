// Direct convolution, as packed_conv2d.cpp: no im2col, no padded copy, taps outside the image are
// not visited. Depthwise convolutions have channels in the lanes, others an input's element in all.
#include "conv2d.h"

#include <algorithm>
#include <cstring>

#include "layer_tasks.h"
#include "parallel.h"
#include "segments.h"

namespace bitkernels {
namespace {

constexpr double kMinProducts = 1e6;  // per task, about 15 us of one core
constexpr int64_t kLinesBytes = 32 << 10;

bool is_depthwise(const RealConv& c) {
  return c.channels == 1 && c.out_channels == 1 && c.groups > 1;
}

// A depthwise convolution as one group of output channels, each of one product a tap.
RealConv lanes(RealConv c) {
  if (is_depthwise(c)) std::swap(c.groups, c.out_channels);
  return c;
}

// A 1x1 convolution at stride 1 has no rows: one image of one long row makes full register tiles.
void flatten_pixels(RealConv& c) {
  c.width = c.out_w = c.batch * c.height * c.width;
  c.batch = c.height = c.out_h = 1;
}

// Channels of a depthwise convolution of which the lines under a window, and the output's, stay in
// the first-level cache until the next row of windows.
int64_t lanes_per_pass(const RealConv& c) {
  const int64_t bytes =
      (c.kh + 1) * std::max<int64_t>(c.width, 1) * static_cast<int64_t>(sizeof(float));
  return 16 * std::max<int64_t>(1, kLinesBytes / (16 * bytes));
}

struct Plan {
  const Kernel& kernel;
  const RealConv& conv;
  bool depthwise;
  int64_t chunk, tile_size;  // output channels of a task; floats of 16 channels' weights
  Segments rows, columns;
};

// Output channels [first, first + chunk) of group g in a rectangle of pixels of image n.
void run_box(const Plan& plan, int64_t n, int64_t g, int64_t first, const Box& box) {
  const RealConv& c = plan.conv;
  const int64_t a_row = c.width * c.in_pixel, a_image = c.height * a_row;
  const int64_t out_row = c.out_w * c.out_pixel;
  RealRun r;
  r.a_ky = c.dilation_h * a_row;
  r.a_kx = c.dilation_w * c.in_pixel;
  r.w_tile = plan.tile_size;
  r.w_ky = c.kw * c.channels * 16;
  r.w_kx = c.channels * 16;
  r.lo = c.lo;
  r.hi = c.hi;
  r.channels = std::min(plan.chunk, c.out_channels - first);
  const int64_t channel = g * c.out_channels + first;
  if (c.bias) r.bias = c.bias + channel;
  const float* input = c.input + n * a_image + (plan.depthwise ? first : g * c.channels);
  const float* weight = c.weight + (g * ceil_div(c.out_channels, 16) + first / 16) * plan.tile_size;
  float* out = c.out + n * c.out_h * out_row + channel;
  const auto run = plan.depthwise ? plan.kernel.depthwise_run : plan.kernel.conv_run;

  for_runs(plan.rows, plan.columns, box,
           [&](const Segment& ys, const Segment& xs, int64_t y, int64_t x, int64_t dy, int64_t dx,
               int64_t count) {
             r.ky = ys.tap_end - ys.tap_begin;
             r.kx = xs.tap_end - xs.tap_begin;
             r.run = c.channels;
             if (r.a_kx == c.channels && !plan.depthwise) {  // neighbouring taps in memory too
               r.run *= r.kx;
               r.kx = 1;
             }
             r.w = weight + ys.tap_begin * r.w_ky + xs.tap_begin * r.w_kx;
             r.a = input;
             if (r.ky && r.kx && r.run)
               r.a += (y * c.stride_h - c.top + ys.tap_begin * c.dilation_h) * a_row +
                      (x * c.stride_w - c.left + xs.tap_begin * c.dilation_w) * c.in_pixel;
             r.a_pixel = dy * c.stride_h * a_row + dx * c.stride_w * c.in_pixel;
             r.out = out + y * out_row + x * c.out_pixel;
             r.out_pixel = dy * out_row + dx * c.out_pixel;
             r.pixels = count;
             run(r);
           });
}

}  // namespace

int64_t arranged_conv2d_size(const Kernel&, const RealConv& conv) {
  const RealConv c = lanes(conv);
  return c.groups * ceil_div(c.out_channels, 16) * 16 * c.kh * c.kw * c.channels;
}

// (groups, tiles, taps, channels, 16)
void arrange_conv2d(const Kernel&, const RealConv& conv, const float* weight, float* out) {
  const RealConv c = lanes(conv);
  const int64_t taps = c.kh * c.kw;
  for (int64_t g = 0; g < c.groups; ++g)
    for (int64_t first = 0; first < c.out_channels; first += 16)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = 0; i < c.channels; ++i)
          for (int64_t o = first; o < first + 16; ++o)
            *out++ = o < c.out_channels
                         ? weight[((g * c.out_channels + o) * c.channels + i) * taps + tap]
                         : 0;
}

void conv2d(const Kernel& kernel, const RealConv& given) {
  RealConv c = lanes(given);
  if (c.kh == 1 && c.kw == 1 && c.stride_h == 1 && c.stride_w == 1 && !c.top && !c.left &&
      c.out_h == c.height && c.out_w == c.width)
    flatten_pixels(c);
  const bool depthwise = is_depthwise(given);

  if (!c.batch || !c.out_h || !c.out_w || !c.groups || !c.out_channels) return;
  const int64_t chunk = depthwise ? lanes_per_pass(c) : c.batch * c.out_h * c.out_w < 4 ? 128 : 32;
  const Plan plan = {kernel,
                     c,
                     depthwise,
                     chunk,
                     c.kh * c.kw * c.channels * 16,
                     Segments(c.out_h, c.height, c.kh, c.stride_h, c.top, c.dilation_h),
                     Segments(c.out_w, c.width, c.kw, c.stride_w, c.left, c.dilation_w)};
  // The inputs of a depthwise layer come from memory: a product costs as much as 3.
  for_tasks(c, chunk, depthwise ? 3 : 1, kMinProducts,
            [&](int64_t n, int64_t g, int64_t first, const Box& box) {
              run_box(plan, n, g, first, box);
            });
}

}  // namespace bitkernels
