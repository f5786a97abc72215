// The CPU engine's inner kernels, free of torch: one table row an instruction set.
//
// Words: 32 signs in a uint32_t, bit i of word j is channel 32 j + i, tail bits 0.
// Filter tiles: 16 output channels innermost, (tile, tap, word, 16); lanes past the last channel 0.
// No kernel reads or writes outside the ranges its arguments state.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitkernels {

constexpr int kTile = 16;      // output channels in a filter tile
constexpr int kMaxPixels = 8;  // output pixels in a register tile

enum class DType { kF32, kF16, kBF16, kF64 };
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t size_of(DType t) { return t == DType::kF64 ? 8 : t == DType::kF32 ? 4 : 2; }

// Sums that begin at this number are floats as they stand: its bits as a float are 2^24, whose
// neighbours are 2 apart, so the bits of it plus n are 2^24 + 2 n, for n up to 2^22 and further.
constexpr int32_t kFloatStart = 0x4b800000;
constexpr float kFloatStartValue = 1 << 24;
constexpr int64_t kMostFloatSums = 1 << 22;

// popcount(a xor w) of `pixels` x (16 * tiles) dot products over a rectangle of filter taps.
struct Dot {
  const uint32_t* a;   // first word of the first tap of the first pixel
  int64_t a_pixel;     // words from one pixel to the next
  int64_t a_ky, a_kx;  // words from one tap to the next
  const uint32_t* w;   // first word of the first tap in the first tile
  int64_t w_tile;      // words between tiles
  int64_t w_ky, w_kx;  // words between taps
  int64_t ky, kx;      // taps
  int64_t run;         // words a tap (several taps of a row, where they lie next to each other)
  int32_t start;       // what the popcounts are added to
  int32_t* acc;        // out: [pixel][16 * tiles]
};

using DotFn = void (*)(const Dot&);

// Dot products on filters in an order of the kernel's own, made once for `chunks` x 32 output
// channels that many pixels meet: acc is [pixel][32 * chunks], and w, w_ky, w_kx and w_tile, here
// from 32 channels to the next, are as in filter tiles of kArrangedLanes lanes.
constexpr int64_t kArrangedLanes = 64;
constexpr int64_t kMostArranged = 0xffff;  // products of a dot product, with those of tail bits
struct Arranged {
  // `words` of `count` tiles, w_tile apart, to (ceil(count / 2), words, lanes).
  void (*arrange)(const uint32_t* tiles, int64_t w_tile, int count, int64_t words, uint32_t* out);
  DotFn dot[2][kMaxPixels];  // [chunks - 1][pixels - 1]
  int64_t multiple[2];       // of this many pixels tiles are best, [chunks - 1]
};

// Taps of a depthwise window that `Kernel::depthwise` can count.
constexpr int kDepthwisePlanes = 8, kMostDepthwiseTaps = (1 << kDepthwisePlanes) - 1;

// Everything between the integer dot product and memory, see reference.epilogue. Vectors are
// float32 per output channel, readable 32 past the end; null where absent.
struct Epilogue {
  bool clamp = false;
  float lo = 0, hi = 0;
  const float *scale = nullptr, *bias = nullptr, *shift_in = nullptr, *slope = nullptr,
              *shift_out = nullptr, *sign_shift = nullptr;
  const int32_t *t_lo = nullptr, *t_hi = nullptr;  // packed bit = t_lo <= dot <= t_hi
  const void* residual = nullptr;
  DType residual_type = DType::kF32;
  int64_t residual_channel = 1;  // elements between channels
  // Channels after which the residual starts again, a multiple of 32; 0: it does not.
  int64_t residual_repeats = 0;
  void* out = nullptr;  // real output
  DType out_type = DType::kF32;
  bool out_int = false;  // int32 dot products instead
  int64_t out_channel = 1;
  // Dot products next to each other as int16 (or int32) instead, and the sums of them and of their
  // squares, or of max(dot, 0) where `relu`, added to 2 x output channels of `moments`.
  int64_t* moments = nullptr;
  bool out_short = false, relu = false;
  uint32_t* words = nullptr;  // packed output
};

// Register tiles of neighbouring pixels on their way out: `pixels` rows of 16 * tiles accumulators.
struct Tile {
  const int32_t* acc;
  int64_t acc_pixel;  // from one pixel to the next
  int pixels, tiles;
  int32_t products;                                  // dot = products - 2 (acc - start)
  int32_t start;                                     // 0, or kFloatStart: products even, no bounds
  int64_t channel;                                   // first output channel
  int channels;                                      // valid ones
  int64_t out, out_pixel, residual, residual_pixel;  // element offset and step
  int64_t word, word_pixel;                          // of the word that holds bit `channel`
  int64_t* moments;                                  // 2 x 32 sums of this chunk of channels
};

// Products and epilogue in one pass, whose sums never leave the registers: Dot::acc and Tile::acc
// are not used.
using FusedFn = void (*)(const Dot&, const Epilogue&, const Tile&);

// Rows of `channels` elements of a residual block, see reference.residual_block_forward and its
// backward. Vectors are float, or double where type is kF64, per channel, readable 32 past the end;
// null where absent.
struct BlockRows {
  int64_t rows = 0, channels = 0;
  const void* dot = nullptr;  // int16 where short_dot, else int32
  bool short_dot = false, relu = false;
  DType type = DType::kF32;                         // of residual and grad, and of arithmetic
  const void *residual = nullptr, *grad = nullptr;  // residual null: not needed
  const void *scale = nullptr, *bias = nullptr;     // value = dot * scale + bias + residual
  const void *shift_in = nullptr, *slope = nullptr, *shift_out = nullptr;
  const void* center = nullptr;                         // of the dot products
  const void *p = nullptr, *q = nullptr, *r = nullptr;  // p grad + q (dot - center) + r
  void* out = nullptr;
  DType out_type = DType::kF32;
  void* sums = nullptr;  // 4 x channels of the vectors' type, added to
};

enum class Estimator { kSte, kApprox, kSwish, kIdentity };

// grad * d sign(x + shift) / dx, plus `add`, over n elements of each row; parameters as for rsign
// below.
struct SignBackward {
  const void *grad = nullptr, *x = nullptr, *add = nullptr;  // add may be null
  DType grad_type = DType::kF32, type = DType::kF32;         // type: of x, add and out
  int64_t n = 0;
  int64_t rows = 1, row = 0;  // row: elements from one to the next
  const void* shift = nullptr;
  bool repeat = false;
  Estimator estimator = Estimator::kIdentity;
  double clip = 0, beta = 0;
  void *out = nullptr, *sum = nullptr;  // sum: of the first term, added to
};

// Gradient of signs by tables: the sums of every subset of 6 output gradients are made once, and
// each weight, whose inputs' signs name such a subset, costs one addition for 6 products.
constexpr int kSubset = 6, kTables = 6, kTablePixels = kSubset * kTables;

// acc[entry] += sum over tables t of table t's row that offsets[t][entry] names, 16 channels a row.
struct TableSums {
  const void* grad = nullptr;  // rows of 16 output channels, `stride` elements apart
  DType type = DType::kF32;
  int64_t stride = 0;
  int pixels = 0, channels = 0;       // at most kTablePixels and 16; the rest counts as 0
  const uint16_t* offsets = nullptr;  // (kTables, entries): 64 * (bits of the subset)
  int64_t entries = 0;
  float* acc = nullptr;  // (entries, 16)
};

// The same for the gradient of an input: weights' signs name subsets of 4 of 32 output channels,
// and 32 pixels lie in the lanes. acc[c] += sum over o of planes[o] * (bit o of bits[c] ? 1 : -1).
constexpr int kPlanePixels = 32;
struct PlaneSums {
  const float* planes = nullptr;  // 32 pixels of each output channel, `plane` elements apart
  int64_t plane = 0;
  int count = 0;  // output channels, at most 32
  const uint32_t* bits = nullptr;
  int64_t channels = 0;  // input channels
  float* acc = nullptr;  // (channels, 32)
};

// A row of output pixels of a real layer, in whose windows the same taps fall inside the image.
struct RealRun {
  const float* a = nullptr;  // first of these taps of the first pixel
  int64_t a_pixel = 0, a_ky = 0, a_kx = 0, ky = 0, kx = 0;
  int64_t run = 0;  // products a tap (several taps of a row, where they are neighbours in memory)
  const float* w = nullptr;  // as a: tiles of 16 output channels innermost, see Dot
  int64_t w_tile = 0, w_ky = 0, w_kx = 0;
  const float* bias = nullptr;
  float lo = 0, hi = 0;
  float divisor = 1;                 // of an average
  int64_t pixels = 0, channels = 0;  // of out
  float* out = nullptr;
  int64_t out_pixel = 0;
};

// The same of an int8 layer. a and w are words of `Int8Dot::depth` channels.
struct Int8Run {
  const int32_t* a = nullptr;
  int64_t a_pixel = 0, a_ky = 0, a_kx = 0, ky = 0, kx = 0, run = 0;
  const int32_t* w = nullptr;
  int64_t w_tile = 0, w_ky = 0, w_kx = 0;
  const int32_t* start = nullptr;  // what each of ky x start_kx taps adds to 16 sums; may be null
  int64_t start_tile = 0, start_ky = 0, start_kx = 0;
  const float *scale = nullptr, *bias = nullptr;  // bias may be null
  float lo = 0, hi = 0;
  int64_t pixels = 0, channels = 0;
  float* out = nullptr;
  int64_t out_pixel = 0;
};

// A way to multiply int8 in exact sums of int32.
struct Int8Dot {
  const char* name;
  bool (*supported)();
  int depth;   // elements a 32-bit word: 4 of 8 bits, or 2 of 16
  int offset;  // what is added to an activation in memory, where the instruction takes it unsigned
  // Rows of n floats, `row` apart, to words: round(x * steps) in [-127, 127], 0 where x is NaN.
  void (*quantize)(const float* x, int64_t rows, int64_t row, int64_t n, float steps, int32_t* out);
  void (*run)(const Int8Run&);
};
constexpr int kInt8Ways = 2;

struct RowsJob;  // elementwise.h

struct Kernel {
  const char* name;
  bool (*supported)();
  const Arranged* arranged;  // null where tiles are best as they are
  // Best first; the last that is not null runs wherever the kernel does.
  const Int8Dot* int8[kInt8Ways];
  DotFn dot[2][kMaxPixels];  // [tiles - 1][pixels - 1]
  // Of 32 channels that have a window each: a and w have one word a tap, bit i of channel i; acc is
  // [pixel][32].
  DotFn depthwise[kMaxPixels];  // [pixels - 1]
  void (*epilogue)(const Epilogue&, const Tile&);
  // What takes such tiles, of this many pixels and more, in one pass; null where nothing does.
  FusedFn (*fused_rows)(const Dot&, const Epilogue&, const Tile&);
  // Signs of x + shift and, where mask is not null, |x + shift| <= clip. `shift` is float, or
  // double for kF64; may be null. Rows of `channels` innermost elements:
  void (*pack_rows)(const void* x, DType, int64_t rows, int64_t channels, const void* shift,
                    double clip, uint32_t* signs, uint32_t* mask);
  // Up to 32 channels, `plane` elements apart, of `pixels` elements each, to one word a pixel, the
  // words `words` apart; `readable` elements may be read from x on:
  void (*pack_planes)(const void* x, DType, int64_t pixels, int64_t plane, int channels,
                      int64_t readable, const void* shift, double clip, uint32_t* signs,
                      uint32_t* mask, int64_t words);
  void (*unpack_rows)(const uint32_t* words, DType, int64_t rows, int64_t channels, void* out);
  void (*mask_rows)(const void* grad, DType, int64_t rows, int64_t channels, const uint32_t* mask,
                    void* out);
  void (*mask_planes)(const void* grad, DType, int64_t pixels, int64_t plane, int channels,
                      const uint32_t* mask, int64_t words, void* out);
  // Activations over n elements. Parameters are float, or double for kF64; element i uses entry i,
  // or entry i % 16 where `repeat` (16 equal entries: one channel's plane). Sums are added to.
  void (*rsign)(const void* x, DType, int64_t n, const void* shift, bool repeat, void* out);
  void (*rprelu)(const void* x, DType, int64_t n, const void* shift_in, const void* slope,
                 const void* shift_out, bool repeat, void* out);
  void (*rprelu_backward)(const void* grad, const void* x, DType, int64_t n, const void* shift_in,
                          const void* slope, bool repeat, void* grad_x, void* sum_in,
                          void* sum_slope, void* sum_out);
  void (*sign_backward)(const SignBackward&);
  void (*block_forward)(const BlockRows&);   // out: the activation of the value
  void (*block_backward)(const BlockRows&);  // out: gradient of the value, where slope is given
  void (*norm_backward)(const BlockRows&);   // out: gradient of the dot product
  // 32 offsets a word: bit i of rows[j][w] says whether entry 32 w + i has pixel j in its subset.
  void (*subset_offsets)(const uint32_t* const rows[kSubset], int64_t words, uint16_t* offsets);
  void (*table_sums)(const TableSums&);
  // Bit j of out[i] is bit i of rows[j][0], 32 of each.
  void (*transpose_bits)(const uint32_t* const rows[32], uint32_t* out);
  void (*plane_sums)(const PlaneSums&);
  // Rows of channels, times scale unless null, to planes `plane` elements apart, and back.
  void (*rows_to_planes)(const void* x, DType, int64_t pixels, int64_t channels, const float* scale,
                         float* planes, int64_t plane);
  void (*planes_to_rows)(const float* planes, int64_t plane, int64_t pixels, int64_t channels,
                         void* out, DType);
  void (*conv_run)(const RealRun&);
  // Output channel i sees input channel i alone; run is 1.
  void (*depthwise_run)(const RealRun&);
  void (*max_run)(const RealRun&);   // largest of the taps
  void (*mean_run)(const RealRun&);  // their sum over `divisor`
  void (*affine_run)(const RowsJob&);
  void (*multiply_run)(const RowsJob&);
  void (*sigmoid_run)(const RowsJob&);
  // `iterations` rounds of what counts the most products a clock, in registers; returns products.
  int64_t (*popcount_loop)(int64_t iterations, uint32_t* sink);
};

// The functions of a Kernel, but for tables of several. An instruction set has the same names, by
// which isa_table.inc fills a row. BK_INFERENCE_ONLY leaves out what networks alone do not need.
#define BK_TRAINING_FUNCTIONS(DO)                                                            \
  DO(mask_rows), DO(mask_planes), DO(rprelu_backward), DO(sign_backward), DO(block_forward), \
      DO(block_backward), DO(norm_backward), DO(subset_offsets), DO(table_sums),             \
      DO(transpose_bits), DO(plane_sums), DO(rows_to_planes), DO(planes_to_rows),            \
      DO(popcount_loop)
#define BK_INFERENCE_FUNCTIONS(DO)                                                              \
  DO(supported), DO(epilogue), DO(fused_rows), DO(pack_rows), DO(pack_planes), DO(unpack_rows), \
      DO(rsign), DO(rprelu), DO(conv_run), DO(depthwise_run), DO(max_run), DO(mean_run),        \
      DO(affine_run), DO(multiply_run), DO(sigmoid_run)
#define BK_SIZE(FUNCTION) sizeof(Kernel::FUNCTION)
constexpr std::size_t kFunctionSizes[] = {BK_TRAINING_FUNCTIONS(BK_SIZE),
                                          BK_INFERENCE_FUNCTIONS(BK_SIZE)};
#undef BK_SIZE
static_assert(sizeof(Kernel) == sizeof(Kernel::name) + sizeof(Kernel::arranged) +
                                    sizeof(Kernel::int8) + sizeof(Kernel::dot) +
                                    sizeof(Kernel::depthwise) + sizeof(kFunctionSizes),
              "a function of Kernel is in neither list");

// Best first; every machine supports the last.
extern const Kernel* const kKernels[];
extern const int kKernelCount;

// The kernel in use: the first supported one, or the one that BITKERNELS_CPU names. Throws
// std::runtime_error where that name is unknown or not supported here.
const Kernel& kernel();

}  // namespace bitkernels
