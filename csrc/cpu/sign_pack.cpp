#include "sign_pack.h"

#include <algorithm>

#include "parallel.h"

namespace bitkernels {
namespace {

constexpr int64_t kElements = 1 << 15;  // per task, about 10 us of one core
constexpr int64_t kPixels = 1 << 10;    // planes are cut into blocks of pixels

template <class T>
T* advance(T* p, DType type, int64_t elements) {
  using Byte = std::conditional_t<std::is_const<T>::value, const char, char>;
  return p ? reinterpret_cast<Byte*>(p) + elements * size_of(type) : nullptr;
}

int64_t rows_per_task(int64_t channels) {
  return std::max<int64_t>(1, kElements / std::max<int64_t>(channels, 1));
}

// f(element offset of the first channel's first pixel, pixels, channels, word offset, outer index,
// first channel)
template <class F>
void for_planes(int64_t outer, int64_t channels, int64_t inner, const F& f) {
  const int64_t words = (channels + 31) / 32, blocks = (inner + kPixels - 1) / kPixels;
  const int64_t grain = 1 + kElements / (32 * std::max<int64_t>(1, std::min(kPixels, inner)));
  parallel_for(outer * words * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % blocks * kPixels, j = i / blocks % words, n = i / blocks / words;
      const int64_t c = 32 * j;
      f((n * channels + c) * inner + p, std::min(kPixels, inner - p),
        static_cast<int>(std::min<int64_t>(32, channels - c)), (n * inner + p) * words + j, n, c);
    }
  });
}

}  // namespace

void sign_pack(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
               int64_t inner, const void* shift, int64_t samples, double clip, uint32_t* signs,
               uint32_t* mask) {
  const int64_t words = (channels + 31) / 32, each = outer / samples;
  const DType wide = type == DType::kF64 ? DType::kF64 : DType::kF32;
  if (inner == 1) {
    parallel_for(outer, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end;) {
        const int64_t n = r / each, stop = std::min(end, (n + 1) * each);
        kernel.pack_rows(advance(x, type, r * channels), type, stop - r, channels,
                         advance(shift, wide, n * channels), clip, signs + r * words,
                         mask ? mask + r * words : nullptr);
        r = stop;
      }
    });
    return;
  }
  for_planes(outer, channels, inner,
             [&](int64_t at, int64_t pixels, int count, int64_t word, int64_t n, int64_t c) {
               kernel.pack_planes(advance(x, type, at), type, pixels, inner, count,
                                  outer * channels * inner - at,
                                  advance(shift, wide, n / each * channels + c), clip, signs + word,
                                  mask ? mask + word : nullptr, words);
             });
}

void mask_grad(const Kernel& kernel, const void* grad, DType type, int64_t outer, int64_t channels,
               int64_t inner, const uint32_t* mask, void* out) {
  const int64_t words = (channels + 31) / 32;
  if (inner == 1) {
    parallel_for(outer, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      kernel.mask_rows(advance(grad, type, begin * channels), type, end - begin, channels,
                       mask + begin * words, advance(out, type, begin * channels));
    });
    return;
  }
  for_planes(outer, channels, inner,
             [&](int64_t at, int64_t pixels, int count, int64_t word, int64_t, int64_t) {
               kernel.mask_planes(advance(grad, type, at), type, pixels, inner, count, mask + word,
                                  words, advance(out, type, at));
             });
}

void unpack(const Kernel& kernel, const uint32_t* words, DType type, int64_t rows, int64_t channels,
            void* out) {
  const int64_t per_row = (channels + 31) / 32;
  parallel_for(rows, rows_per_task(channels), [&](int64_t begin, int64_t end) {
    kernel.unpack_rows(words + begin * per_row, type, end - begin, channels,
                       advance(out, type, begin * channels));
  });
}

}  // namespace bitkernels
