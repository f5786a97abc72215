// AVX-512 with VPOPCNTDQ (Ice Lake, Zen 4 and later): one 512-bit xor, popcount and add per 512
// products, 16 output channels in the lanes, so that no sum ever crosses a lane.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "elementwise.h"
#include "kernels.h"

namespace bitkernels::avx2 {
extern const Int8Dot kInt8Pairs;  // for a machine that hides its VNNI
}

namespace bitkernels::avx512 {

#define BK_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,f16c,bmi2")))

constexpr const char* kName = "avx512";
constexpr int kLanes = 16;

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("bmi2");
}

#define BK_MASK_REGISTERS

template <class Lanes>
BK_TARGET inline uint32_t bits16(const Lanes* v) {
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(v[0]));
}
BK_TARGET inline uint32_t less16(__m512 v, float limit) {
  return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_LT_OQ);
}
BK_TARGET inline uint32_t not_less16(__m512 v, __m512 limit) {
  return _mm512_cmp_ps_mask(v, limit, _CMP_NLT_UQ);
}
BK_TARGET inline uint32_t within16(__m512 v, float clip) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(clip), _CMP_LE_OQ);
}
template <class Lanes>
BK_TARGET inline uint32_t between16(Lanes v, Lanes lo, Lanes hi) {
  const __m512i x = reinterpret_cast<__m512i>(v);
  return _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(x, reinterpret_cast<__m512i>(lo)), x,
                                      reinterpret_cast<__m512i>(hi));
}

BK_TARGET inline void half_to_float16(const uint16_t* x, float* y) {
  _mm512_storeu_ps(y, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
}

BK_TARGET inline void float_to_half16(const float* y, uint16_t* x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_cvtps_ph(_mm512_loadu_ps(y), _MM_FROUND_TO_NEAREST_INT));
}

#define BK_UNROLL _Pragma("GCC unroll 8")

template <int PIXELS, int TILES>
BK_TARGET void dot(const Dot& d) {
  __m512i acc[PIXELS][TILES];
  BK_UNROLL for (int p = 0; p < PIXELS; ++p) BK_UNROLL for (int t = 0; t < TILES; ++t) acc[p][t] =
      _mm512_set1_epi32(d.start);
  const int64_t a_pixel = d.a_pixel, w_tile = d.w_tile, run = d.run;
  for (int64_t y = 0; y < d.ky; ++y)
    for (int64_t x = 0; x < d.kx; ++x) {
      const uint32_t* a = d.a + y * d.a_ky + x * d.a_kx;
      const uint32_t* w = d.w + y * d.w_ky + x * d.w_kx;
      for (int64_t i = 0; i < run; ++i, ++a, w += 16) {
        __m512i weight[TILES];
        BK_UNROLL for (int t = 0; t < TILES; ++t) weight[t] = _mm512_loadu_si512(w + t * w_tile);
        BK_UNROLL for (int p = 0; p < PIXELS; ++p) {
          const __m512i word = _mm512_set1_epi32(static_cast<int>(a[p * a_pixel]));
          BK_UNROLL for (int t = 0; t < TILES; ++t) acc[p][t] =
              _mm512_add_epi32(acc[p][t], _mm512_popcnt_epi32(_mm512_xor_si512(word, weight[t])));
        }
      }
    }
  BK_UNROLL for (int p = 0; p < PIXELS; ++p) BK_UNROLL for (int t = 0; t < TILES; ++t)
      _mm512_storeu_si512(d.acc + (p * TILES + t) * 16, acc[p][t]);
}

BK_TARGET int64_t popcount_loop(int64_t iterations, uint32_t* sink) {
  __m512i acc[16], x = _mm512_set1_epi32(static_cast<int>(*sink));
  for (auto& v : acc) v = _mm512_set1_epi32(1);
  for (int64_t i = 0; i < iterations; ++i) {
    for (auto& v : acc) v = _mm512_add_epi32(v, _mm512_popcnt_epi32(_mm512_xor_si512(v, x)));
  }
  for (auto& v : acc) *sink += static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(v)));
  return iterations * 16 * 512;
}

#define BK_MASKED_ROWS
template <class Lanes>
BK_TARGET inline void load_masked(const float* x, int n, Lanes* y) {
  y[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), x);
}
template <class Lanes>
BK_TARGET inline void store_masked(const Lanes* y, int n, float* x) {
  _mm512_mask_storeu_ps(x, static_cast<__mmask16>((1 << n) - 1), y[0]);
}

// Register tiles of real layers, in pixels and tiles of 16 channels: the usual one, one of a single
// tile of channels, and one of few pixels.
BK_TARGET inline __m512 broadcast(float x) { return _mm512_set1_ps(x); }
BK_TARGET inline __m512 fused(__m512 x, __m512 y, __m512 z) { return _mm512_fmadd_ps(x, y, z); }
constexpr int kConvPixels = 14, kNarrowPixels = 28, kFewPixels = 3, kConvTiles = 2, kFewTiles = 8;

#define BK_OVERLAPPED_ROWS "isa_rows_avx512.inc"

#include "isa_common.inc"

// Bytes by VNNI, of which the activations' are unsigned.
namespace vnni {
#pragma push_macro("BK_TARGET")
#undef BK_TARGET
#define BK_TARGET                                                            \
  __attribute__((                                                            \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,f16c,bmi2," \
             "avx512vnni")))
constexpr const char* kInt8Name = "vnni";
constexpr int kInt8Depth = 4, kInt8Offset = 128;
bool int8_supported() { return __builtin_cpu_supports("avx512vnni"); }
BK_TARGET inline Ints dot_words(Ints acc, Ints a, Ints w) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(w)));
}
#include "isa_int8.inc"
#pragma pop_macro("BK_TARGET")
}  // namespace vnni

constexpr const Int8Dot* kInt8Dots[kInt8Ways] = {&vnni::kInt8Dot, &avx2::kInt8Pairs};

#include "isa_table.inc"

}  // namespace bitkernels::avx512
#endif
