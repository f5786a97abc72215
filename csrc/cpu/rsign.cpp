#include "rsign.h"

#include "tasks.h"

namespace bitkernels {

void rsign(const Kernel& kernel, const void* x, DType type, int64_t outer, int64_t channels,
           int64_t inner, const void* shift, int64_t samples, void* out) {
  const DType wide = type == DType::kF64 ? DType::kF64 : DType::kF32;
  const int64_t each = outer * inner * channels / samples;  // elements
  const auto shifts_of = [&](int64_t element) {             // the first of its sample
    return samples > 1 ? element / each * channels : 0;
  };
  Tasks{outer, channels, inner}.run([&](int64_t first, int64_t count, int64_t c) {
    if (c >= 0) {
      Repeated a;
      return kernel.rsign(at(x, type, first), type, count, a.of(shift, type, shifts_of(first) + c),
                          true, at(out, type, first));
    }
    for (int64_t i = 0; i < count; i += channels)
      kernel.rsign(at(x, type, first + i), type, channels, at(shift, wide, shifts_of(first + i)),
                   false, at(out, type, first + i));
  });
}

}  // namespace bitkernels
