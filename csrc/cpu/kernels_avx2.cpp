// AVX2: popcount of nibbles by table look-up (pshufb), accumulated in bytes and widened to the
// 32-bit lanes of 8 output channels before a byte can overflow.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "elementwise.h"
#include "kernels.h"

namespace bitkernels::avx2 {

#define BK_TARGET __attribute__((target("avx2,fma,f16c,bmi2,popcnt")))

constexpr const char* kName = "avx2";
constexpr int kLanes = 8;

// GCC 10 and clang 14 do not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
}

template <class Lanes>
BK_TARGET inline uint32_t bits16(const Lanes* mask) {
  const uint32_t low = _mm256_movemask_ps(reinterpret_cast<__m256>(mask[0]));
  const uint32_t high = _mm256_movemask_ps(reinterpret_cast<__m256>(mask[1]));
  return low | high << 8;
}

#define BK_UNROLL _Pragma("GCC unroll 8")

BK_TARGET inline void half_to_float16(const uint16_t* x, float* y) {
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_ps(y + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
}

BK_TARGET inline void float_to_half16(const float* y, uint16_t* x) {
  for (int i = 0; i < 16; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(y + i), _MM_FROUND_TO_NEAREST_INT));
}

BK_TARGET inline __m256i byte_popcount(__m256i x) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(x, nibble);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
}

// Sum of the 4 bytes of each 32-bit lane.
BK_TARGET inline __m256i widen(__m256i bytes) {
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Adds the byte sums to the 32-bit ones in memory and clears them.
template <int PIXELS>
BK_TARGET inline void flush(__m256i* bytes, int32_t* sum, int64_t step) {
  BK_UNROLL for (int p = 0; p < PIXELS; ++p) {
    __m256i* to = reinterpret_cast<__m256i*>(sum + p * step);
    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), widen(bytes[p])));
    bytes[p] = _mm256_setzero_si256();
  }
}

// PIXELS pixels x 8 channels: byte sums in registers, flushed before a 32nd addition of at most 8.
template <int PIXELS>
BK_TARGET inline void dot8(const Dot& d, const uint32_t* tile, int32_t* sum, int64_t step) {
  constexpr int64_t kRoom = 31;
  __m256i bytes[PIXELS];
  BK_UNROLL for (int p = 0; p < PIXELS; ++p) {
    bytes[p] = _mm256_setzero_si256();
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum + p * step), bytes[p]);
  }
  const int64_t a_pixel = d.a_pixel;
  int64_t room = kRoom;
  for (int64_t y = 0; y < d.ky; ++y)
    for (int64_t x = 0; x < d.kx; ++x) {
      const uint32_t* a = d.a + y * d.a_ky + x * d.a_kx;
      const uint32_t* w = tile + y * d.w_ky + x * d.w_kx;
      for (int64_t left = d.run; left > 0;) {
        const int64_t n = left < room ? left : room;
        for (int64_t i = 0; i < n; ++i, ++a, w += 16) {
          const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          BK_UNROLL for (int p = 0; p < PIXELS; ++p) {
            const __m256i word = _mm256_set1_epi32(static_cast<int>(a[p * a_pixel]));
            bytes[p] = _mm256_add_epi8(bytes[p], byte_popcount(_mm256_xor_si256(word, weight)));
          }
        }
        left -= n;
        room -= n;
        if (room == 0) {
          flush<PIXELS>(bytes, sum, step);
          room = kRoom;
        }
      }
    }
  flush<PIXELS>(bytes, sum, step);
}

template <int PIXELS, int TILES>
BK_TARGET void dot(const Dot& d) {
  for (int half = 0; half < 2 * TILES; ++half)
    dot8<PIXELS>(d, d.w + half / 2 * d.w_tile + half % 2 * 8, d.acc + half * 8, TILES * 16);
}

BK_TARGET int64_t popcount_loop(int64_t iterations, uint32_t* sink) {
  __m256i acc[8], x = _mm256_set1_epi32(static_cast<int>(*sink));
  for (auto& v : acc) v = _mm256_set1_epi8(1);
  for (int64_t i = 0; i < iterations; ++i)
    for (auto& v : acc) v = _mm256_add_epi8(v, byte_popcount(_mm256_xor_si256(v, x)));
  for (auto& v : acc) *sink += static_cast<uint32_t>(_mm256_extract_epi32(v, 0));
  return iterations * 8 * 256;
}

#define BK_MASKED_ROWS
// The lanes below n of registers 0 and 1.
BK_TARGET inline __m256i lanes_below(int n, int part) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8 * part), lane);
}
template <class Lanes>
BK_TARGET inline void load_masked(const float* x, int n, Lanes* y) {
  for (int i = 0; i < 2; ++i) y[i] = _mm256_maskload_ps(x + 8 * i, lanes_below(n, i));
}
template <class Lanes>
BK_TARGET inline void store_masked(const Lanes* y, int n, float* x) {
  for (int i = 0; i < 2; ++i) _mm256_maskstore_ps(x + 8 * i, lanes_below(n, i), y[i]);
}

// Register tiles of real layers, in pixels and tiles of 16 channels: the usual one, one of a single
// tile of channels, and one of few pixels.
BK_TARGET inline __m256 broadcast(float x) { return _mm256_set1_ps(x); }
BK_TARGET inline __m256 fused(__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }
constexpr int kConvPixels = 6, kNarrowPixels = 6, kFewPixels = 1, kConvTiles = 1, kFewTiles = 4;

#include "isa_common.inc"

}  // namespace bitkernels::avx2
#endif
