// How fast the 1-bit tensor core is with nothing else to do: the peak that benchmarks compare with.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// p.rows rounds of 4 (wgmma) or 32 (mma.sync) products a warpgroup or warp; the sums go to p.out,
// one a thread, so that nothing is left out.
template <bool WARPGROUPS>
struct Peak {
  DEVICE static void run(const Params& p) {
    const int thread = block_index() * block_threads() + thread_index();
    int sum = 0;
    if (WARPGROUPS) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
      int d[32][4] = {};
      const u32 shared = shared_address(shared_memory());
      const u64 a = wide_descriptor(shared + thread_index() / 128 * 8192);
      const u64 b = wide_descriptor(shared + 16384);
      for (int i = 0; i < p.rows; ++i) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma_and<256>(d, a + 2 * k, b + 2 * k, true);
        wgmma_commit();
        wgmma_wait<1>();
      }
      wgmma_wait<0>();
      for (auto& line : d) {
        for (int x : line) sum += x;
      }
#endif
    } else {
      int d[32][4] = {};
      const u32 x = thread * 2654435761u;
      for (int i = 0; i < p.rows; ++i) {
#pragma unroll
        for (auto& line : d) mma_and(line, x, x + 1, x + 2, x + 3, ~x, x * 3);
      }
      for (auto& line : d) {
        for (int y : line) sum += y;
      }
    }
    static_cast<int*>(p.out)[thread] = sum;
  }
};
