#include "mask_grad.h"

#include "planes.h"

namespace bitkernels {

void mask_grad(const Kernel& kernel, const void* grad, DType type, int64_t outer, int64_t channels,
               int64_t inner, const uint32_t* mask, void* out) {
  const int64_t words = (channels + 31) / 32;
  if (inner == 1) {
    parallel_for(outer, rows_per_task(channels), [&](int64_t begin, int64_t end) {
      kernel.mask_rows(at(grad, type, begin * channels), type, end - begin, channels,
                       mask + begin * words, at(out, type, begin * channels));
    });
    return;
  }
  for_planes(outer, channels, inner,
             [&](int64_t first, int64_t pixels, int count, int64_t word, int64_t, int64_t) {
               kernel.mask_planes(at(grad, type, first), type, pixels, inner, count, mask + word,
                                  words, at(out, type, first));
             });
}

}  // namespace bitkernels
