// The table of kernels, best first, and the choice among them.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace bitkernels {

namespace avx512 {
extern const Kernel kKernel;
}
namespace avx2 {
extern const Kernel kKernel;
}
namespace neon {
extern const Kernel kKernel;
}
namespace scalar {
extern const Kernel kKernel;
}

const Kernel* const kKernels[] = {
#if defined(__x86_64__)
    &avx512::kKernel, &avx2::kKernel,
#elif defined(__aarch64__)
    &neon::kKernel,
#endif
    &scalar::kKernel};
const int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

namespace {

const Kernel* choose() {
  const char* forced = std::getenv("BITKERNELS_CPU");
  std::string names;
  for (const Kernel* k : kKernels) {
    if (!k->supported()) continue;
    if (!forced || !*forced || std::string(forced) == k->name) return k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("bitkernels: BITKERNELS_CPU must be one of " + names +
                           ", reference, got '" + forced + "'");
}

}  // namespace

const Kernel& kernel() {
  static const Kernel* const chosen = choose();
  return *chosen;
}

}  // namespace bitkernels
