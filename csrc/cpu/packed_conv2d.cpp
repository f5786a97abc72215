// Direct convolution: no im2col, no padded copy. The output is cut into rectangles in which the
// same filter taps fall inside the image, so that zero padding costs nothing and is exact: taps
// outside are not visited and not counted. Rectangles are covered by register tiles of up to 8
// pixels by 32 channels. The sums of neighbouring tiles go through the epilogue together, which
// loads its vectors of channels once for them, while they are in the first-level cache.
#include "packed_conv2d.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "parallel.h"
#include "segments.h"

namespace bitkernels {
namespace {

constexpr int64_t kChunk = 2 * kTile;   // output channels of a register tile
constexpr int64_t kFewPixels = 8;       // that do not repay arranging filters
constexpr int64_t kSums = 4096;         // between products and epilogue, 16 KiB
constexpr int64_t kFusedPixels = 4096;  // of a call that keeps its sums
constexpr double kMinProducts = 1e7;    // per task, 4 us of one core with AVX-512
constexpr int64_t kOutput = 200;        // products that cost as much as an output's epilogue

// The input as the register tiles read it: one group's words of a pixel are `words` long.
struct View {
  const uint32_t* data;
  int64_t image, row, pixel, group, words;
};

struct Plan {
  const Kernel& kernel;
  const Conv& conv;
  const Epilogue& epilogue;
  View in;
  Strides out, residual;
  int64_t out_words, tiles_per_group, tile_size;
  const Arranged* arranged;  // null: filter tiles as they are
  bool depthwise;            // groups of one channel each: `in` and the filters have a word a tap
  int64_t width;             // output channels of a task: kChunk, or twice that where arranged
  Segments rows, columns;
};

// Output channels [first, first + channels) of a group, and their filters, which are arranged or
// not.
struct Channels {
  int64_t group, first;
  int channels;
  const uint32_t* filters;
};

// Filters of the channels after these, asked for while these are computed, a few lines a register
// tile, since more would wait for each other: in a network constants come from beyond the
// second-level cache.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t each = 0;  // bytes a tile

  void filters(const uint32_t* from, int64_t words, int64_t tiles) {
    at = reinterpret_cast<const char*>(from);
    end = at + 4 * words;
    each = ceil_div(4 * words, tiles);
  }
  void until(const char* stop) {
    for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
  }
  void a_few() { until(std::min(end, at + each)); }
};

// One run of output pixels, `count` of them from (y, x) on in steps of (dy, dx).
void run_tiles(const Plan& plan, int64_t n, const Channels& c, const Segment& ys, const Segment& xs,
               int64_t y, int64_t x, int64_t dy, int64_t dx, int64_t count, int64_t* moments,
               Ahead& ahead) {
  const Conv& conv = plan.conv;
  const View& in = plan.in;
  const int64_t ky = ys.tap_end - ys.tap_begin, kx = xs.tap_end - xs.tap_begin;
  const int chunks = c.channels > kChunk ? 2 : 1, tiles = c.channels > kTile ? 2 : 1;
  const int64_t lanes = plan.depthwise ? 1 : plan.arranged ? kArrangedLanes : kTile;
  const int64_t multiple = plan.arranged ? plan.arranged->multiple[chunks - 1] : 1;
  const DotFn* dots = plan.depthwise  ? plan.kernel.depthwise
                      : plan.arranged ? plan.arranged->dot[chunks - 1]
                                      : plan.kernel.dot[tiles - 1];

  alignas(64) int32_t acc[kSums];
  Dot dot;
  dot.a_pixel = dy * conv.stride_h * in.row + dx * conv.stride_w * in.pixel;
  dot.a_ky = conv.dilation_h * in.row;
  dot.a_kx = conv.dilation_w * in.pixel;
  dot.w_tile = plan.tile_size / kTile * lanes;
  dot.w_ky = conv.kw * in.words * lanes;
  dot.w_kx = in.words * lanes;
  dot.ky = ky;
  if (!plan.depthwise && dot.a_kx == in.words) {  // neighbouring taps are neighbours in memory
    dot.kx = 1;
    dot.run = kx * in.words;
  } else {
    dot.kx = kx;
    dot.run = in.words;
  }
  dot.w = c.filters + ys.tap_begin * dot.w_ky + xs.tap_begin * dot.w_kx;

  Tile tile;
  tile.acc_pixel = plan.depthwise || plan.arranged ? kChunk * chunks : kTile * tiles;
  tile.products = static_cast<int32_t>(ky * kx * conv.channels);
  // Float epilogues begin with dot products as floats, which an even number of products gives at
  // once; with bounds, or as an integer, the sum itself is wanted.
  const Epilogue& e = plan.epilogue;
  const bool floats = !e.clamp && !e.t_lo && !e.out_int && !e.moments;
  tile.start =
      floats && tile.products % 2 == 0 && tile.products <= kMostFloatSums ? kFloatStart : 0;
  dot.start = tile.start;
  tile.out_pixel = dy * plan.out.h + dx * plan.out.w;
  tile.residual_pixel = dy * plan.residual.h + dx * plan.residual.w;
  tile.word_pixel = (dy * conv.out_w + dx) * plan.out_words;

  FusedFn fused = nullptr;
  int64_t parts = ceil_div(count, kFusedPixels);
  if (!plan.depthwise && !plan.arranged) {
    tile.pixels = static_cast<int>(count / parts);
    tile.channels = c.channels;
    tile.tiles = tiles;
    tile.channel = c.group * conv.out_channels + c.first;
    fused = plan.kernel.fused_rows(dot, e, tile);
  }
  if (!fused) parts = ceil_div(count, kMaxPixels);
  // Equal shares, of at most kMaxPixels in a tile but for the kernel's wish, so that no thin tile
  // is left over.
  for (int64_t left = count; parts > 0;) {
    const int64_t in_y = y * conv.stride_h - conv.top + ys.tap_begin * conv.dilation_h;
    const int64_t in_x = x * conv.stride_w - conv.left + xs.tap_begin * conv.dilation_w;
    dot.a = in.data + n * in.image + c.group * in.group + in_y * in.row + in_x * in.pixel +
            (plan.depthwise ? c.first / kChunk : 0);
    int64_t pass = 0;  // pixels
    if (fused) {
      pass = ceil_div(left, parts--);
      left -= pass;
      ahead.until(ahead.end);
    }
    for (; !fused && parts > 0 && (pass + kMaxPixels) * tile.acc_pixel <= kSums; --parts) {
      const int64_t pixels = std::min(left, ceil_div(ceil_div(left, parts), multiple) * multiple);
      dot.acc = acc + pass * tile.acc_pixel;
      ahead.a_few();
      dots[pixels - 1](dot);
      dot.a += pixels * dot.a_pixel;
      pass += pixels;
      left -= pixels;
    }
    tile.pixels = static_cast<int>(pass);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int done = chunk * static_cast<int>(kChunk);
      tile.acc = acc + done;
      tile.channels = std::min(c.channels - done, static_cast<int>(kChunk));
      tile.tiles = tile.channels > kTile ? 2 : 1;
      tile.channel = c.group * conv.out_channels + c.first + done;
      tile.moments = moments + 2 * done;
      tile.out = n * plan.out.n + tile.channel * plan.out.c + y * plan.out.h + x * plan.out.w;
      const int64_t repeats = plan.epilogue.residual_repeats;
      tile.residual = n * plan.residual.n +
                      (repeats ? tile.channel % repeats : tile.channel) * plan.residual.c +
                      y * plan.residual.h + x * plan.residual.w;
      tile.word = ((n * conv.out_h + y) * conv.out_w + x) * plan.out_words + tile.channel / 32;
      if (fused)
        fused(dot, e, tile);
      else
        plan.kernel.epilogue(e, tile);
    }
    y += dy * pass;
    x += dx * pass;
  }
}

// Filters as a kernel arranged them; the tasks of a thread that follow each other often share them.
struct ArrangedFilters {
  const uint32_t* tiles = nullptr;  // what they were made of, in this call
  std::vector<uint32_t>& lanes;     // of the thread, so that later calls allocate nothing
};

void run_box(const Plan& plan, int64_t n, int64_t g, int64_t part, const Box& box,
             ArrangedFilters& arranged) {
  const int64_t first = part * plan.width;
  const int64_t channels = std::min(plan.width, plan.conv.out_channels - first);
  const uint32_t* filters =
      plan.conv.tiles + (g * plan.tiles_per_group + first / kTile) * plan.tile_size;
  if (plan.depthwise) filters = plan.conv.tiles + first / kChunk * plan.tile_size;
  const int64_t pixels = (box.y1 - box.y0) * (box.x1 - box.x0);
  const int64_t next = std::min(plan.conv.out_channels - first - channels, plan.width);
  Ahead ahead;
  if (next > 0 && pixels > kFewPixels && !plan.depthwise) {
    ahead.filters(filters + plan.width / kTile * plan.tile_size,
                  ceil_div(next, kTile) * plan.tile_size, pixels / kMaxPixels);
    // Here and in no function of its own, of which GCC would think that it does nothing.
    const Epilogue& e = plan.epilogue;
    const int64_t channel = g * plan.conv.out_channels + first + channels;
    for (const float* v : {e.scale, e.bias, e.shift_in, e.slope, e.shift_out, e.sign_shift})
      for (int64_t i = 0; v && i < next; i += 16) __builtin_prefetch(v + channel + i, 0, 2);
  }
  if (plan.arranged) {
    const int64_t words = plan.tile_size / kTile;
    const auto size = static_cast<size_t>(plan.width / kChunk * words * kArrangedLanes);
    if (arranged.lanes.size() < size) arranged.lanes.resize(size);
    if (arranged.tiles != filters)
      plan.arranged->arrange(filters, plan.tile_size, static_cast<int>(ceil_div(channels, kTile)),
                             words, arranged.lanes.data());
    arranged.tiles = filters;
    filters = arranged.lanes.data();
  }
  const Channels c = {g, first, static_cast<int>(channels), filters};
  int64_t moments[4 * kChunk] = {};
  for_runs(
      plan.rows, plan.columns, box,
      [&](const Segment& ys, const Segment& xs, int64_t y, int64_t x, int64_t dy, int64_t dx,
          int64_t count) { run_tiles(plan, n, c, ys, xs, y, x, dy, dx, count, moments, ahead); });
  if (!plan.epilogue.moments) return;
  const int64_t all = plan.conv.groups * plan.conv.out_channels;
  int64_t* total = plan.epilogue.moments + g * plan.conv.out_channels + first;
  for (int64_t i = 0; i < channels; ++i) {  // integers: the order does not matter
    const int64_t* of = moments + i / kChunk * 2 * kChunk + i % kChunk;
    __atomic_fetch_add(total + i, of[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(total + all + i, of[kChunk], __ATOMIC_RELAXED);
  }
}

// `count` bits from bit `begin` of a pixel's words, aligned to bit 0, tail bits 0.
void copy_bits(const uint32_t* words, int64_t total_words, int64_t begin, int64_t count,
               uint32_t* out) {
  const int64_t first = begin / 32, shift = begin % 32, n = ceil_div(count, 32);
  for (int64_t j = 0; j < n; ++j) {
    uint32_t word = words[first + j] >> shift;
    if (shift && first + j + 1 < total_words) word |= words[first + j + 1] << (32 - shift);
    out[j] = word;
  }
  if (count % 32) out[n - 1] &= (1u << count % 32) - 1;
}

// Groups that do not start at a word, and padding with +-1, go through a copy: (groups, batch,
// padded height, padded width, words of a group).
View relayout(Conv& conv, std::vector<uint32_t>& copy) {
  const int64_t words = ceil_div(conv.channels, 32);
  const int64_t all_words = ceil_div(conv.groups * conv.channels, 32);
  const bool pads = conv.pad_value != 0;
  const int64_t top = pads ? conv.top : 0, left = pads ? conv.left : 0;
  const int64_t height = conv.height + (pads ? conv.top + conv.bottom : 0);
  const int64_t width = conv.width + (pads ? conv.left + conv.right : 0);
  const double size = static_cast<double>(conv.groups) * conv.batch * height * width * words;
  if (size > 1e15) throw std::length_error("bitkernels: the padded input is too large");
  copy.assign(conv.groups * conv.batch * height * width * words, 0);
  if (conv.pad_value == 1) {
    for (size_t i = 0; i < copy.size(); ++i)
      copy[i] = (i + 1) % words || conv.channels % 32 == 0 ? ~0u : (1u << conv.channels % 32) - 1;
  }
  parallel_for(conv.groups * conv.batch * conv.height, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % conv.height, image = i / conv.height;
      const int64_t n = image % conv.batch, g = image / conv.batch;
      const uint32_t* from = conv.input + (n * conv.height + y) * conv.width * all_words;
      uint32_t* to = copy.data() + ((image * height + y + top) * width + left) * words;
      if (conv.groups == 1) {
        std::memcpy(to, from, conv.width * words * sizeof(uint32_t));
        continue;
      }
      for (int64_t x = 0; x < conv.width; ++x)
        copy_bits(from + x * all_words, all_words, g * conv.channels, conv.channels,
                  to + x * words);
    }
  });
  if (pads) conv.top = conv.bottom = conv.left = conv.right = 0;
  conv.height = height;
  conv.width = width;
  return {copy.data(),
          height * width * words,
          width * words,
          words,
          conv.batch * height * width * words,
          words};
}

// A depthwise layer as one group whose filters have a word for each tap of 32 channels; `filters`
// keeps them.
void join_groups(Conv& conv, std::vector<uint32_t>& filters) {
  const int64_t taps = conv.kh * conv.kw;
  filters.assign(ceil_div(conv.groups, kChunk) * taps, 0);
  for (int64_t c = 0; c < conv.groups; ++c)
    for (int64_t tap = 0; tap < taps; ++tap)
      filters[c / kChunk * taps + tap] |= (conv.tiles[(c * taps + tap) * kTile] & 1)
                                          << (c % kChunk);
  conv.tiles = filters.data();
  conv.channels = conv.out_channels = conv.groups;
  conv.groups = 1;
}

bool is_dense(const Strides& s, int64_t height, int64_t width) {
  return s.h == width * s.w && s.n == height * s.h;
}

// A 1x1 convolution at stride 1 has no rows: one image of one long row makes full register tiles.
void flatten_pixels(Conv& conv) {
  conv.width = conv.out_w = conv.batch * conv.height * conv.width;
  conv.batch = conv.height = conv.out_h = 1;
}

}  // namespace

void packed_conv2d(const Kernel& kernel, Conv conv, Epilogue epilogue, Strides out,
                   Strides residual) {
  std::vector<uint32_t> joined;
  const bool depthwise = conv.groups > 1 && conv.channels == 1 && conv.out_channels == 1 &&
                         conv.kh * conv.kw <= kMostDepthwiseTaps;
  if (depthwise) join_groups(conv, joined);
  const int64_t words = ceil_div(conv.channels, 32);
  const int64_t all_words = ceil_div(conv.groups * conv.channels, 32);
  const bool padded = conv.top || conv.bottom || conv.left || conv.right;
  const bool pointwise =
      conv.kh == 1 && conv.kw == 1 && conv.stride_h == 1 && conv.stride_w == 1 && !padded;
  if (pointwise && (!epilogue.out || is_dense(out, conv.out_h, conv.out_w)) &&
      (!epilogue.residual || is_dense(residual, conv.out_h, conv.out_w)))
    flatten_pixels(conv);

  std::vector<uint32_t> copy;
  View in = {
      conv.input, conv.height * conv.width * all_words, conv.width * all_words, all_words, words,
      words};
  if ((conv.groups > 1 && conv.channels % 32) || (padded && conv.pad_value != 0))
    in = relayout(conv, copy);

  if (depthwise) conv.channels = in.words = 1;  // of a window
  const int64_t tile_size = conv.kh * conv.kw * (depthwise ? 1 : words * kTile);
  const Arranged* arranged = !depthwise && conv.out_channels > kTile &&
                                     conv.out_h * conv.out_w > kFewPixels &&
                                     2 * tile_size <= kMostArranged
                                 ? kernel.arranged
                                 : nullptr;
  const int64_t width = arranged ? 2 * kChunk : kChunk;
  const int64_t parts = ceil_div(conv.out_channels, width);
  const int64_t out_words = ceil_div(conv.groups * conv.out_channels, 32);
  // Groups that end inside a word share words: then one task owns a pixel's words, zeroed first.
  const bool shared_words = epilogue.words && conv.groups > 1 && conv.out_channels % 32;
  if (shared_words)
    std::memset(epilogue.words, 0,
                conv.batch * conv.out_h * conv.out_w * out_words * sizeof(uint32_t));

  const Plan plan = {
      kernel,
      conv,
      epilogue,
      in,
      out,
      residual,
      out_words,
      ceil_div(conv.out_channels, kTile),
      tile_size,
      arranged,
      depthwise,
      width,
      Segments(conv.out_h, conv.height, conv.kh, conv.stride_h, conv.top, conv.dilation_h),
      Segments(conv.out_w, conv.width, conv.kw, conv.stride_w, conv.left, conv.dilation_w)};

  // Tasks: (image, group, part of the channels) or image, times blocks of rows (of columns in a
  // one-row image) where that alone gives too few.
  const int64_t inner = shared_words ? conv.groups * parts : 1;
  const int64_t outer = conv.batch * conv.groups * parts / inner;
  const int threads = parallel_threads();
  const int64_t wanted = ceil_div(4 * threads, std::max<int64_t>(outer, 1));
  const bool by_rows = conv.out_h > 1;
  const int64_t blocks = threads == 1 ? 1
                         : by_rows    ? std::min(wanted, conv.out_h)
                                      : std::min(wanted, ceil_div(conv.out_w, kMaxPixels));
  const double products = static_cast<double>(conv.out_h) * conv.out_w * width * inner / blocks *
                          (conv.kh * conv.kw * conv.channels + kOutput);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kMinProducts / products));
  parallel_for(outer * blocks, grain, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<uint32_t> lanes;
    ArrangedFilters arranged_filters = {nullptr, lanes};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks, task = i / blocks;
      Box box = {0, conv.out_h, 0, conv.out_w};
      int64_t& lo = by_rows ? box.y0 : box.x0;
      int64_t& hi = by_rows ? box.y1 : box.x1;
      const int64_t size = hi;
      lo = size * block / blocks;
      hi = size * (block + 1) / blocks;
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t at = task * inner + j;
        run_box(plan, at / parts / conv.groups, at / parts % conv.groups, at % parts, box,
                arranged_filters);
      }
    }
  });
}

}  // namespace bitkernels
