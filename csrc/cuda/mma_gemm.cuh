// packed_linear and packed_conv2d on mma.sync m16n8k256 ... and.popc: sm_80 to sm_90.
//
// A block computes BM windows by BN filters, a warp WM by WN of them. K comes in steps of 512 bits
// through a ring of STAGES shared tiles, filled by cp.async while earlier ones are consumed.
//
// The order of K is free as long as both operands keep the same, since a popcount does not see it.
// Lane t of a quad therefore takes the 16 contiguous bytes t of a row: words 4t and 4t + 1 go into
// the first product of a step, 4t + 2 and 4t + 3 into the second. One 16-byte load feeds four
// registers and nothing is shuffled (ldmatrix is not needed).
//
// Window counts come from the fragments that pass through the registers anyway. The warps of a
// tile row hold the same windows, so they take turns by steps of K and add up at the end.
#pragma once
#include "epilogue.cuh"
#include "gather.cuh"
#include "scheduler.cuh"

template <int BM, int BN, int WM, int WN, int STAGES>
struct MmaGemm {
  static constexpr int STEP = 64;  // bytes of K
  static constexpr int MT = WM / 16, NT = WN / 8;
  static constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int STAGE = (BM + BN) * STEP;
  static constexpr int SHARED = STAGES * STAGE + BM * sizeof(Window) + WARPS_N * BM * 4;

  DEVICE static void run(const Params& p) {
    unsigned char* const shared = shared_memory();
    Window* const windows = reinterpret_cast<Window*>(shared + STAGES * STAGE);
    int* const counts = reinterpret_cast<int*>(windows + BM);  // [WARPS_N][BM]
    const u32 ring = shared_address(shared);
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    const int tiles_m = (p.rows + BM - 1) / BM, tiles_n = (COUT + BN - 1) / BN;
    const Tile tile = tile_at(block_index(), tiles_m, tiles_n);
    const int m0 = tile.m * BM, n0 = tile.n * BN;

    for (int i = thread; i < BM; i += THREADS) windows[i] = window_of(m0 + i, p.rows);
    sync_threads();

    const int steps = (K_BYTES + STEP - 1) / STEP;
    auto fetch = [&](int step) {
      const u32 a = ring + step % STAGES * STAGE;
      if (step < steps) {
        gather_step<BM, BN, THREADS>(a, a + BM * STEP, windows, n0, p, step * STEP, thread);
      }
      copy_async_commit();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);

    int acc[MT][NT][4] = {};
    int count[MT][2] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<STAGES - 2>();
      sync_threads();  // the step's tiles are there, and all have left the tiles of the one before
      fetch(step + STAGES - 1);
      const u32 a = ring + step % STAGES * STAGE, b = a + BM * STEP;
      u32 rows[MT][2][4];
#pragma unroll
      for (int f = 0; f < MT; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp_m * WM + 16 * f + 8 * h + lane / 4;
          load_shared4(rows[f][h], a + narrow_offset(row, lane % 4 * 16));
        }
      }
      if (step % WARPS_N == warp_n) {
#pragma unroll
        for (int f = 0; f < MT; ++f) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int w = 0; w < 4; ++w) count[f][h] += popcount(rows[f][h][w]);
          }
        }
      }
#pragma unroll
      for (int g = 0; g < NT; ++g) {
        u32 filter[4];
        load_shared4(filter, b + narrow_offset(warp_n * WN + 8 * g + lane / 4, lane % 4 * 16));
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
#pragma unroll
          for (int f = 0; f < MT; ++f) {
            mma_and(acc[f][g], rows[f][0][half], rows[f][1][half], rows[f][0][half + 1],
                    rows[f][1][half + 1], filter[half], filter[half + 1]);
          }
        }
      }
    }

#pragma unroll
    for (int f = 0; f < MT; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int sum = count[f][h];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (lane % 4 == 0) counts[warp_n * BM + warp_m * WM + 16 * f + 8 * h + lane / 4] = sum;
      }
    }
    sync_threads();
    int pa[MT][2] = {};
#pragma unroll
    for (int f = 0; f < MT; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < WARPS_N; ++w) {
          pa[f][h] += counts[w * BM + warp_m * WM + 16 * f + 8 * h + lane / 4];
        }
      }
    }
    epilogue<NT>(acc, pa, p, PreparedCorrections{p.corr}, m0 + warp_m * WM, n0 + warp_n * WN, lane);
  }
};
