// Threads, provided by whoever links the engine: torch's pool in torch/register_engine.cpp, its own
// in the stand-alone kernel test.
#pragma once
#include <cstdint>

namespace bitkernels {

int parallel_threads();
// Calls body(begin, end, context) over disjoint ranges that cover [0, n), each at least `grain`
// long but the last.
void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain || parallel_threads() == 1) return f(int64_t{0}, n);
  parallel_run(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

}  // namespace bitkernels
