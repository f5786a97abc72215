#include "sign_pack.h"

#include "planes.h"

namespace bitkernels {

void sign_pack(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
               int64_t inner, const void* shift, int64_t samples, double clip, uint32_t* signs,
               uint32_t* mask) {
  const int64_t words = (channels + 31) / 32, each = outer / samples;
  const DType wide = type == DType::kF64 ? DType::kF64 : DType::kF32;
  if (inner == 1) {
    parallel_for(outer, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end;) {
        const int64_t n = r / each, stop = std::min(end, (n + 1) * each);
        kernel.pack_rows(at(x, type, r * channels), type, stop - r, channels,
                         at(shift, wide, n * channels), clip, signs + r * words,
                         mask ? mask + r * words : nullptr);
        r = stop;
      }
    });
    return;
  }
  for_planes(outer, channels, inner,
             [&](int64_t first, int64_t pixels, int count, int64_t word, int64_t n, int64_t c) {
               kernel.pack_planes(at(x, type, first), type, pixels, inner, count,
                                  outer * channels * inner - first,
                                  at(shift, wide, n / each * channels + c), clip, signs + word,
                                  mask ? mask + word : nullptr, words);
             });
}

}  // namespace bitkernels
