#include "unpack.h"

#include "planes.h"

namespace bitkernels {

void unpack(const Kernel& kernel, const uint32_t* words, DType type, int64_t rows, int64_t channels,
            void* out) {
  const int64_t per_row = (channels + 31) / 32;
  parallel_for(rows, rows_per_task(channels), [&](int64_t begin, int64_t end) {
    kernel.unpack_rows(words + begin * per_row, type, end - begin, channels,
                       at(out, type, begin * channels));
  });
}

}  // namespace bitkernels
