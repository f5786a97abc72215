// NEON (every AArch64): eor, cnt on bytes, byte sums widened to the 32-bit lanes of 4 output
// channels before a byte can overflow.
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "elementwise.h"
#include "kernels.h"

namespace bitkernels::neon {

#define BK_TARGET

constexpr const char* kName = "neon";
constexpr int kLanes = 4;

bool supported() { return true; }

// One bit a lane to a 4-bit number, by a sum of lane weights.
inline uint32_t mask4(uint32x4_t all_ones) {
  const uint32x4_t weight = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(all_ones, weight));
}

template <class Lanes>
inline uint32_t bits16(const Lanes* v) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i)
    bits |= mask4(vcltzq_s32(reinterpret_cast<int32x4_t>(v[i]))) << (4 * i);
  return bits;
}

inline void half_to_float16(const uint16_t* x, float* y) {
  for (int i = 0; i < 16; i += 4)
    vst1q_f32(y + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
}

inline void float_to_half16(const float* y, uint16_t* x) {
  for (int i = 0; i < 16; i += 4)
    vst1_u16(x + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(y + i))));
}

// PIXELS (at most 4) pixels x 16 channels: byte sums in registers, widened before a 32nd addition
// of at most 8 to the 32-bit sums in memory.
template <int PIXELS>
inline void dot16(const Dot& d, int first, int tile, int tiles) {
  constexpr int64_t kRoom = 31;
  uint8x16_t bytes[PIXELS][4];
  uint32x4_t sum[PIXELS][4];
  for (int p = 0; p < PIXELS; ++p)
    for (int q = 0; q < 4; ++q) {
      bytes[p][q] = vdupq_n_u8(0);
      sum[p][q] = vdupq_n_u32(static_cast<uint32_t>(d.start));
    }
  const auto flush = [&] {
    for (int p = 0; p < PIXELS; ++p)
      for (int q = 0; q < 4; ++q) {
        sum[p][q] = vpadalq_u16(sum[p][q], vpaddlq_u8(bytes[p][q]));
        bytes[p][q] = vdupq_n_u8(0);
      }
  };
  int64_t room = kRoom;
  for (int64_t y = 0; y < d.ky; ++y)
    for (int64_t x = 0; x < d.kx; ++x) {
      const uint32_t* a = d.a + first * d.a_pixel + y * d.a_ky + x * d.a_kx;
      const uint32_t* w = d.w + tile * d.w_tile + y * d.w_ky + x * d.w_kx;
      for (int64_t left = d.run; left > 0;) {
        const int64_t n = left < room ? left : room;
        for (int64_t i = 0; i < n; ++i, ++a, w += 16)
          for (int q = 0; q < 4; ++q) {
            const uint32x4_t weight = vld1q_u32(w + 4 * q);
            for (int p = 0; p < PIXELS; ++p) {
              const uint32x4_t v = veorq_u32(vdupq_n_u32(a[p * d.a_pixel]), weight);
              bytes[p][q] = vaddq_u8(bytes[p][q], vcntq_u8(vreinterpretq_u8_u32(v)));
            }
          }
        left -= n;
        room -= n;
        if (room == 0) {
          flush();
          room = kRoom;
        }
      }
    }
  flush();
  for (int p = 0; p < PIXELS; ++p)
    for (int q = 0; q < 4; ++q)
      vst1q_s32(d.acc + ((first + p) * tiles + tile) * 16 + 4 * q,
                vreinterpretq_s32_u32(sum[p][q]));
}

template <int PIXELS, int TILES>
void dot(const Dot& d) {
  constexpr int kFirst = PIXELS > 4 ? PIXELS / 2 : PIXELS, kRest = PIXELS - kFirst;
  for (int t = 0; t < TILES; ++t) {
    dot16<kFirst>(d, 0, t, TILES);
    if constexpr (kRest > 0) dot16<kRest>(d, kFirst, t, TILES);
  }
}

int64_t popcount_loop(int64_t iterations, uint32_t* sink) {
  uint8x16_t acc[16], x = vreinterpretq_u8_u32(vdupq_n_u32(*sink));
  for (auto& v : acc) v = vdupq_n_u8(1);
  for (int64_t i = 0; i < iterations; ++i)
    for (auto& v : acc) v = vaddq_u8(v, vcntq_u8(veorq_u8(v, x)));
  for (auto& v : acc) *sink += vaddvq_u8(v);
  return iterations * 16 * 128;
}

// Register tiles of real layers, in pixels and tiles of 16 channels: the usual one, one of a single
// tile of channels, and one of few pixels.
inline float32x4_t broadcast(float x) { return vdupq_n_f32(x); }
inline float32x4_t fused(float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }
constexpr int kConvPixels = 6, kNarrowPixels = 6, kFewPixels = 1, kConvTiles = 1, kFewTiles = 4;

#include "isa_common.inc"

namespace bytes {
constexpr const char* kInt8Name = "bytes";
constexpr int kInt8Depth = 4, kInt8Offset = 0;
bool int8_supported() { return true; }
// Two products, of at most 127 * 128 each, fit 16 bits.
inline Ints dot_words(Ints acc, Ints words, Ints weights) {
  const auto a = reinterpret_cast<int8x16_t>(words), w = reinterpret_cast<int8x16_t>(weights);
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(w)), high = vmull_high_s8(a, w);
  return reinterpret_cast<Ints>(
      vpadalq_s16(reinterpret_cast<int32x4_t>(acc), vpaddq_s16(low, high)));
}
#include "isa_int8.inc"
}  // namespace bytes

// Four products at once, where the machine has the instruction: compiled by GCC on Linux, where
// that can be asked; clang before 16 knows it for whole files only.
#if defined(__linux__) && !defined(__clang__)
namespace sdot {
#pragma push_macro("BK_TARGET")
#undef BK_TARGET
#define BK_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
constexpr const char* kInt8Name = "sdot";
constexpr int kInt8Depth = 4, kInt8Offset = 0;
bool int8_supported() {
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts;
}
BK_TARGET inline Ints dot_words(Ints acc, Ints a, Ints w) {
  return reinterpret_cast<Ints>(vdotq_s32(reinterpret_cast<int32x4_t>(acc),
                                          reinterpret_cast<int8x16_t>(w),
                                          reinterpret_cast<int8x16_t>(a)));
}
#include "isa_int8.inc"
#pragma pop_macro("BK_TARGET")
}  // namespace sdot
constexpr const Int8Dot* kInt8Dots[kInt8Ways] = {&sdot::kInt8Dot, &bytes::kInt8Dot};
#else
constexpr const Int8Dot* kInt8Dots[kInt8Ways] = {&bytes::kInt8Dot};
#endif

#include "isa_table.inc"

}  // namespace bitkernels::neon
#endif
