// As conv2d.cpp, behind a pass that rounds the image. Where the instruction takes unsigned
// activations they are stored with 128 added, and each tap inside the image subtracts 128 times the
// sum of its weights; taps outside are not visited, so that padding is 0.
#include "int8_conv2d.h"

#include <algorithm>
#include <cstring>

#include "layer_tasks.h"
#include "parallel.h"
#include "segments.h"

namespace bitkernels {
namespace {

constexpr double kMinProducts = 4e6;  // per task, about 15 us of one core
constexpr int64_t kElements = 1 << 16;

int64_t words_of(const Int8Dot& dot, const RealConv& c) { return ceil_div(c.channels, dot.depth); }
int64_t tiles_of(const RealConv& c) { return ceil_div(c.out_channels, 16); }

// Whether each pixel of the output is one of the input's: the others need not be rounded.
bool is_pointwise(const RealConv& c) {
  return c.kh == 1 && c.kw == 1 && !c.top && !c.left && (c.out_h - 1) * c.stride_h < c.height &&
         (c.out_w - 1) * c.stride_w < c.width;
}

struct Plan {
  const Int8Dot& dot;
  const Int8Conv& given;
  RealConv c;  // on the rounded image: in_pixel is in words
  int64_t words, chunk;
  Segments rows, columns;
};

// Rounds the pixels that are read, one behind the other.
void quantize(const Int8Dot& dot, const Int8Conv& conv, bool pointwise) {
  const RealConv& c = conv.layer;
  const int64_t height = pointwise ? c.out_h : c.height, width = pointwise ? c.out_w : c.width;
  const int64_t dy = pointwise ? c.stride_h : 1, dx = pointwise ? c.stride_w : 1;
  const int64_t pixel = c.groups * words_of(dot, c), all = c.groups * c.channels;
  const bool aligned = c.channels % dot.depth == 0 || c.groups == 1;
  const int64_t grain = 1 + kElements / std::max<int64_t>(width * all, 1);
  parallel_for(c.batch * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const float* x =
          conv.layer.input + (line / height * c.height + line % height * dy) * c.width * c.in_pixel;
      int32_t* out = conv.quantized + line * width * pixel;
      if (aligned && all % dot.depth == 0 && dx * c.in_pixel == all) {
        dot.quantize(x, 1, 0, width * all, conv.steps, out);
      } else if (aligned) {
        dot.quantize(x, width, dx * c.in_pixel, all, conv.steps, out);
      } else {
        for (int64_t i = 0; i < width; ++i)
          dot.quantize(x + i * dx * c.in_pixel, c.groups, c.channels, c.channels, conv.steps,
                       out + i * pixel);
      }
    }
  });
}

// Output channels [first, first + chunk) of group g in a rectangle of pixels of image n.
void run_box(const Plan& plan, int64_t n, int64_t g, int64_t first, const Box& box) {
  const RealConv& c = plan.c;
  const int64_t a_row = c.width * c.in_pixel, out_row = c.out_w * c.out_pixel;
  const int64_t taps = c.kh * c.kw, tiles = tiles_of(c), tile = g * tiles + first / 16;
  const int64_t channel = g * c.out_channels + first;
  Int8Run r;
  r.a_ky = c.dilation_h * a_row;
  r.a_kx = c.dilation_w * c.in_pixel;
  r.w_tile = taps * plan.words * 16;
  r.w_ky = c.kw * plan.words * 16;
  r.w_kx = plan.words * 16;
  r.start_tile = taps * 16;
  r.start_ky = c.kw * 16;
  r.scale = plan.given.scale + channel;
  if (c.bias) r.bias = c.bias + channel;
  r.lo = c.lo;
  r.hi = c.hi;
  r.channels = std::min(plan.chunk, c.out_channels - first);
  const int32_t* input = plan.given.quantized + n * c.height * a_row + g * plan.words;
  const int32_t* weight = plan.given.weight + tile * r.w_tile;
  const int32_t* start = plan.given.weight + c.groups * tiles * r.w_tile + tile * r.start_tile;
  float* out = c.out + n * c.out_h * out_row + channel;

  for_runs(plan.rows, plan.columns, box,
           [&](const Segment& ys, const Segment& xs, int64_t y, int64_t x, int64_t dy, int64_t dx,
               int64_t count) {
             r.ky = ys.tap_end - ys.tap_begin;
             r.kx = r.start_kx = xs.tap_end - xs.tap_begin;
             r.run = plan.words;
             if (r.a_kx == plan.words) {  // neighbouring taps in memory too
               r.run *= r.kx;
               r.kx = 1;
             }
             r.w = weight + ys.tap_begin * r.w_ky + xs.tap_begin * r.w_kx;
             if (plan.dot.offset) r.start = start + ys.tap_begin * r.start_ky + xs.tap_begin * 16;
             r.a = input;
             if (r.ky && r.kx && r.run)
               r.a += (y * c.stride_h - c.top + ys.tap_begin * c.dilation_h) * a_row +
                      (x * c.stride_w - c.left + xs.tap_begin * c.dilation_w) * c.in_pixel;
             r.a_pixel = dy * c.stride_h * a_row + dx * c.stride_w * c.in_pixel;
             r.out = out + y * out_row + x * c.out_pixel;
             r.out_pixel = dy * out_row + dx * c.out_pixel;
             r.pixels = count;
             plan.dot.run(r);
           });
}

}  // namespace

const Int8Dot& int8_dot(const Kernel& kernel) {
  const Int8Dot* const* way = kernel.int8;
  while (!(*way)->supported()) ++way;
  return **way;
}

int64_t int8_input_size(const Int8Dot& dot, const RealConv& c) {
  const int64_t pixels = is_pointwise(c) ? c.out_h * c.out_w : c.height * c.width;
  return c.batch * pixels * c.groups * words_of(dot, c);
}

int64_t arranged_int8_size(const Int8Dot& dot, const RealConv& c) {
  return c.groups * tiles_of(c) * c.kh * c.kw * 16 * (words_of(dot, c) + (dot.offset ? 1 : 0));
}

// (groups, tiles, taps, words, 16), then, with an offset, what each tap adds: (groups, tiles, taps,
// 16).
void arrange_int8_conv2d(const Int8Dot& dot, const RealConv& c, const int8_t* weight,
                         int32_t* out) {
  const int64_t taps = c.kh * c.kw, words = words_of(dot, c), tiles = tiles_of(c);
  const int bits = 32 / dot.depth;
  int32_t* start = out + c.groups * tiles * taps * words * 16;
  for (int64_t g = 0; g < c.groups; ++g)
    for (int64_t first = 0; first < tiles * 16; first += 16)
      for (int64_t tap = 0; tap < taps; ++tap) {
        uint32_t sums[16] = {};
        for (int64_t i = 0; i < words; ++i)
          for (int64_t o = first; o < first + 16; ++o) {
            uint32_t word = 0;
            const int64_t end = std::min<int64_t>(c.channels, (i + 1) * dot.depth);
            for (int64_t k = i * dot.depth; o < c.out_channels && k < end; ++k) {
              const int w = weight[((g * c.out_channels + o) * c.channels + k) * taps + tap];
              const auto element = static_cast<uint32_t>(w);
              sums[o - first] += element;
              word |= (bits == 8 ? element & 0xff : element & 0xffff) << (k % dot.depth * bits);
            }
            *out++ = static_cast<int32_t>(word);
          }
        if (!dot.offset) continue;
        for (const uint32_t sum : sums)
          *start++ = static_cast<int32_t>(0u - static_cast<uint32_t>(dot.offset) * sum);
      }
}

void int8_conv2d(const Int8Dot& dot, const Int8Conv& given) {
  RealConv c = given.layer;
  const bool pointwise = is_pointwise(c);
  const int64_t pixels = c.batch * c.out_h * c.out_w;
  if (!pixels || !c.groups || !c.out_channels) return;
  quantize(dot, given, pointwise);
  const int64_t words = words_of(dot, c);
  c.in_pixel = c.groups * words;
  if (pointwise) {  // one image of one long row makes full register tiles
    c.width = c.out_w = pixels;
    c.batch = c.height = c.out_h = c.stride_h = c.stride_w = 1;
  }

  const int64_t chunk = pixels < 4 ? 128 : 32;
  const Plan plan = {dot,
                     given,
                     c,
                     words,
                     chunk,
                     Segments(c.out_h, c.height, c.kh, c.stride_h, c.top, c.dilation_h),
                     Segments(c.out_w, c.width, c.kw, c.stride_w, c.left, c.dilation_w)};
  for_tasks(c, chunk, 1, kMinProducts, [&](int64_t n, int64_t g, int64_t first, const Box& box) {
    run_box(plan, n, g, first, box);
  });
}

}  // namespace bitkernels
