// AVX2: popcount of nibbles by table look-up (pshufb), accumulated in bytes and widened before a
// byte can overflow. Where filters meet many pixels they are arranged first, so that one look-up
// counts the differences of 4 channels of a pixel and of 32 filters at once: the pixel's nibble
// names the table, the filters' nibbles the entries. That is 2 instructions for 128 products; the
// xor and popcount of words, for filters as they are, take 8 for 256.
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
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum + p * step), _mm256_set1_epi32(d.start));
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

// counts[a][w]: bits that differ between nibbles a and w.
struct Differences {
  alignas(64) uint8_t counts[16][16] = {};
  constexpr Differences() {
    for (int a = 0; a < 16; ++a)
      for (int w = 0; w < 16; ++w)
        for (int x = a ^ w; x; x /= 2) counts[a][w] = static_cast<uint8_t>(counts[a][w] + x % 2);
  }
};
constexpr Differences kDifferences;

// Words of 32 channels of 32 filters, two tiles, to (8 nibbles of the words, 32 filters in bytes):
// twice the size, but an eighth less to do for each product.
BK_TARGET void arrange(const uint32_t* tiles, int64_t w_tile, int count, int64_t words,
                       uint32_t* out) {
  const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int t = 0; t < count; t += 2) {
    const uint32_t* low = tiles + t * w_tile;
    const uint32_t* high = t + 1 < count ? low + w_tile : low;  // in place of a tile that is not
    for (int64_t i = 0; i < words; ++i, low += 16, high += 16, out += kArrangedLanes) {
      __m256i q[4];  // 4 filters of each tile: their bytes 0, their bytes 1, ...
      for (int j = 0; j < 4; ++j) {
        const __m128i l = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low) + j);
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high) + j);
        q[j] = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(l), h, 1), bytes);
      }
      const __m256i a = _mm256_unpacklo_epi32(q[0], q[1]), b = _mm256_unpacklo_epi32(q[2], q[3]);
      const __m256i c = _mm256_unpackhi_epi32(q[0], q[1]), d = _mm256_unpackhi_epi32(q[2], q[3]);
      const __m256i in_order[] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b),
                                  _mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d)};
      __m256i* to = reinterpret_cast<__m256i*>(out);
      for (const __m256i& v : in_order) {
        _mm256_storeu_si256(to++, _mm256_and_si256(v, nibble));
        _mm256_storeu_si256(to++, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
      }
    }
  }
}

BK_TARGET inline __m256i differences(uint32_t offset) {
  const uint8_t* table = kDifferences.counts[0] + offset;
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// Adds byte sums to 16-bit ones and clears them: filters 0-7 and 16-23, then the others.
template <int N>
BK_TARGET inline void flush_pairs(__m256i* bytes, __m256i* sums) {
  const __m256i zero = _mm256_setzero_si256();
  BK_UNROLL for (int i = 0; i < N; ++i) {
    sums[2 * i] = _mm256_add_epi16(sums[2 * i], _mm256_unpacklo_epi8(bytes[i], zero));
    sums[2 * i + 1] = _mm256_add_epi16(sums[2 * i + 1], _mm256_unpackhi_epi8(bytes[i], zero));
    bytes[i] = zero;
  }
}

BK_TARGET inline void store_words(__m128i shorts, __m256i start, int32_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_add_epi32(_mm256_cvtepu16_epi32(shorts), start));
}

// PIXELS x (32 * CHUNKS) dot products on arranged filters, at most kMostArranged products each.
template <int PIXELS, int CHUNKS>
BK_TARGET void dot_arranged(const Dot& d) {
  constexpr int64_t kRoom = 255 / 32;  // words until a byte may overflow
  constexpr int kSums = PIXELS * CHUNKS;
  __m256i bytes[kSums], sums[2 * kSums];
  BK_UNROLL for (auto& v : bytes) v = _mm256_setzero_si256();
  for (auto& v : sums) v = _mm256_setzero_si256();
  const int64_t a_pixel = d.a_pixel, w_chunk = d.w_tile;
  int64_t room = kRoom;
  for (int64_t y = 0; y < d.ky; ++y)
    for (int64_t x = 0; x < d.kx; ++x) {
      const uint32_t* a = d.a + y * d.a_ky + x * d.a_kx;
      const uint32_t* w = d.w + y * d.w_ky + x * d.w_kx;
      for (int64_t left = d.run; left > 0;) {
        const int64_t n = left < kRoom ? left : kRoom;
        if (room < n) {
          flush_pairs<kSums>(bytes, sums);
          room = kRoom;
        }
        // A byte of a word a round. Unrolled, GCC 12 puts the additions off and spills.
        _Pragma("GCC unroll 1") for (int64_t i = 0; i < 4 * n; ++i, w += 16) {
          __m256i low[CHUNKS], high[CHUNKS];
          BK_UNROLL for (int c = 0; c < CHUNKS; ++c) {
            const __m256i* nibbles = reinterpret_cast<const __m256i*>(w + c * w_chunk);
            low[c] = _mm256_loadu_si256(nibbles);
            high[c] = _mm256_loadu_si256(nibbles + 1);
          }
          BK_UNROLL for (int p = 0; p < PIXELS; ++p) {
            const uint32_t byte = reinterpret_cast<const uint8_t*>(a + p * a_pixel)[i];
            const __m256i by_low = differences(byte << 4 & 0xf0),
                          by_high = differences(byte & 0xf0);
            BK_UNROLL for (int c = 0; c < CHUNKS; ++c) {
              const __m256i both = _mm256_add_epi8(_mm256_shuffle_epi8(by_low, low[c]),
                                                   _mm256_shuffle_epi8(by_high, high[c]));
              bytes[p * CHUNKS + c] = _mm256_add_epi8(bytes[p * CHUNKS + c], both);
            }
          }
        }
        a += n;
        left -= n;
        room -= n;
      }
    }
  flush_pairs<kSums>(bytes, sums);
  int32_t* to = d.acc;
  const __m256i start = _mm256_set1_epi32(d.start);
  for (int i = 0; i < kSums; ++i, to += 32) {
    store_words(_mm256_castsi256_si128(sums[2 * i]), start, to);
    store_words(_mm256_castsi256_si128(sums[2 * i + 1]), start, to + 8);
    store_words(_mm256_extracti128_si256(sums[2 * i], 1), start, to + 16);
    store_words(_mm256_extracti128_si256(sums[2 * i + 1], 1), start, to + 24);
  }
}

// 5 to 8 pixels of 64 filters have more sums than there are registers.
template <int PIXELS>
BK_TARGET void dot_arranged_halves(const Dot& d) {
  constexpr int kFirst = (PIXELS + 1) / 2;
  dot_arranged<kFirst, 2>(d);
  Dot rest = d;
  rest.a += kFirst * d.a_pixel;
  rest.acc += kFirst * 64;
  dot_arranged<PIXELS - kFirst, 2>(rest);
}

constexpr Arranged kArranged = {
    arrange,
    {{dot_arranged<1, 1>, dot_arranged<2, 1>, dot_arranged<3, 1>, dot_arranged<4, 1>,
      dot_arranged<5, 1>, dot_arranged<6, 1>, dot_arranged<7, 1>, dot_arranged<8, 1>},
     {dot_arranged<1, 2>, dot_arranged<2, 2>, dot_arranged<3, 2>, dot_arranged<4, 2>,
      dot_arranged_halves<5>, dot_arranged_halves<6>, dot_arranged_halves<7>,
      dot_arranged_halves<8>}},
    {1, 4}};
#define BK_ARRANGED &kArranged

BK_TARGET int64_t popcount_loop(int64_t iterations, uint32_t* sink) {
  constexpr int kChains = 8;
  __m256i acc[kChains], x = _mm256_set1_epi32(static_cast<int>(*sink));
  BK_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi8(1);
  for (int64_t n = 0; n < iterations; ++n)
    BK_UNROLL for (int i = 0; i < kChains; ++i) acc[i] =
        _mm256_add_epi8(acc[i], _mm256_shuffle_epi8(x, acc[i]));
  for (const auto& v : acc) *sink += static_cast<uint32_t>(_mm256_extract_epi32(v, 0));
  return iterations * kChains * 128;
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

// Pairs of 16 bits, whose sums of two products cannot saturate.
namespace pairs {
constexpr const char* kInt8Name = "pairs";
constexpr int kInt8Depth = 2, kInt8Offset = 0;
bool int8_supported() { return true; }
BK_TARGET inline Ints dot_words(Ints acc, Ints a, Ints w) {
  return acc + reinterpret_cast<Ints>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(w)));
}
#include "isa_int8.inc"
}  // namespace pairs

// Bytes by VNNI, of which the activations' are unsigned.
namespace vnni {
#pragma push_macro("BK_TARGET")
#undef BK_TARGET
#define BK_TARGET __attribute__((target("avx2,fma,f16c,bmi2,popcnt,avxvnni")))
constexpr const char* kInt8Name = "vnni";
constexpr int kInt8Depth = 4, kInt8Offset = 128;
bool int8_supported() {  // by name GCC 11 does not know it
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
BK_TARGET inline Ints dot_words(Ints acc, Ints a, Ints w) {
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(acc), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(w)));
}
#include "isa_int8.inc"
#pragma pop_macro("BK_TARGET")
}  // namespace vnni

extern const Int8Dot kInt8Pairs;
const Int8Dot kInt8Pairs = pairs::kInt8Dot;
constexpr const Int8Dot* kInt8Dots[kInt8Ways] = {&vnni::kInt8Dot, &kInt8Pairs};

#include "isa_table.inc"

}  // namespace bitkernels::avx2
#endif
