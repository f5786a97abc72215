// Portable: no instruction set beyond the compiler's baseline. Runs everywhere, last in the table.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "elementwise.h"
#include "kernels.h"

namespace bitkernels::scalar {

#define BK_TARGET

constexpr const char* kName = "scalar";
constexpr int kLanes = 4;

bool supported() { return true; }

template <class Lanes>
inline uint32_t bits16(const Lanes* mask) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(mask[i / kLanes][i % kLanes] < 0) << i;
  return bits;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: magnitude * 2^-24, exact in float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float y) {
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                       // subnormal half: adding 1/2 rounds at 2^-24
    float rounded = 0;
    std::memcpy(&rounded, &magnitude, 4);
    rounded += 0.5f;
    uint32_t r;
    std::memcpy(&r, &rounded, 4);
    return sign | static_cast<uint16_t>(r - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

inline void half_to_float16(const uint16_t* x, float* y) {
  for (int i = 0; i < 16; ++i) y[i] = half_to_float(x[i]);
}

inline void float_to_half16(const float* y, uint16_t* x) {
  for (int i = 0; i < 16; ++i) x[i] = float_to_half(y[i]);
}

inline uint32_t popcount(uint32_t x) {
  x -= x >> 1 & 0x55555555;
  x = (x & 0x33333333) + (x >> 2 & 0x33333333);
  return ((x + (x >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24;
}

template <int PIXELS, int TILES>
void dot(const Dot& d) {
  for (int t = 0; t < TILES; ++t)
    for (int p = 0; p < PIXELS; ++p) {
      uint32_t acc[16];
      for (uint32_t& sum : acc) sum = static_cast<uint32_t>(d.start);
      for (int64_t y = 0; y < d.ky; ++y)
        for (int64_t x = 0; x < d.kx; ++x) {
          const uint32_t* a = d.a + p * d.a_pixel + y * d.a_ky + x * d.a_kx;
          const uint32_t* w = d.w + t * d.w_tile + y * d.w_ky + x * d.w_kx;
          for (int64_t i = 0; i < d.run; ++i, w += 16)
            for (int lane = 0; lane < 16; ++lane) acc[lane] += popcount(a[i] ^ w[lane]);
        }
      std::memcpy(d.acc + (p * TILES + t) * 16, acc, sizeof acc);
    }
}

int64_t popcount_loop(int64_t iterations, uint32_t* sink) {
  uint32_t acc[16], x = *sink;
  for (auto& v : acc) v = 1;
  for (int64_t i = 0; i < iterations; ++i)
    for (auto& v : acc) v += popcount(v ^ x);
  for (auto& v : acc) *sink += v;
  return iterations * 16 * 32;
}

// Register tiles of real layers, in pixels and tiles of 16 channels: the usual one, one of a single
// tile of channels, and one of few pixels.
typedef float Four __attribute__((vector_size(16)));
inline Four broadcast(float x) { return Four{x, x, x, x}; }
inline Four fused(Four x, Four y, Four z) { return x * y + z; }
constexpr int kConvPixels = 2, kNarrowPixels = 2, kFewPixels = 1, kConvTiles = 1, kFewTiles = 2;

#include "isa_common.inc"

namespace bytes {
constexpr const char* kInt8Name = "bytes";
constexpr int kInt8Depth = 4, kInt8Offset = 0;
bool int8_supported() { return true; }
inline Ints element(Ints words, int shift) {
  return reinterpret_cast<Ints>(reinterpret_cast<Unsigned>(words) << shift) >> 24;
}
inline Ints dot_words(Ints acc, Ints a, Ints w) {
  for (int shift = 0; shift < 32; shift += 8) acc += element(a, shift) * element(w, shift);
  return acc;
}
#include "isa_int8.inc"
}  // namespace bytes
#if defined(__SSE2__)  // the baseline of x86-64 has pairs of 16 bits
namespace pairs {
constexpr const char* kInt8Name = "pairs";
constexpr int kInt8Depth = 2, kInt8Offset = 0;
bool int8_supported() { return true; }
inline Ints dot_words(Ints acc, Ints a, Ints w) {
  return acc + reinterpret_cast<Ints>(
                   _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(w)));
}
#include "isa_int8.inc"
}  // namespace pairs
constexpr const Int8Dot* kInt8Dots[kInt8Ways] = {&pairs::kInt8Dot, &bytes::kInt8Dot};
#else
constexpr const Int8Dot* kInt8Dots[kInt8Ways] = {&bytes::kInt8Dot};
#endif

#include "isa_table.inc"

}  // namespace bitkernels::scalar
